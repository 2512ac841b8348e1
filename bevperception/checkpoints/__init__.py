"""Loading, saving and converting weights."""
