"""The command `bevperception evaluate` from a checkout."""

from bevperception.errors import importing, run_program

with importing():
    from bevperception.cli.evaluate import main

if __name__ == "__main__":
    run_program(main)
