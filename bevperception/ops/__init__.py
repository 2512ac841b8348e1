"""The Python face of the native operators, with a plain-PyTorch reference beside each."""
