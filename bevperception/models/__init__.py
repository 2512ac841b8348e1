"""Networks. Nothing here imports :mod:`bevperception.data`."""
