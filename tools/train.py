"""The command `bevperception train` from a checkout."""

from bevperception.errors import importing, run_program

with importing():
    from bevperception.cli.train import main

if __name__ == "__main__":
    run_program(main)
