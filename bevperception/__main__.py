"""``python -m bevperception`` is the command ``bevperception``."""

from bevperception.cli.main import entry_point

if __name__ == "__main__":
    entry_point()
