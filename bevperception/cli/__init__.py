"""The command `bevperception` and its sub-commands; programs in tools/ are doors to the same functions."""
