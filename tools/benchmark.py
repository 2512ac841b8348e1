"""The command `bevperception benchmark` from a checkout."""

from bevperception.errors import importing, run_program

with importing():
    from bevperception.cli.benchmark import main

if __name__ == "__main__":
    run_program(main)
