"""The command `bevperception run-plan` from a checkout."""

from bevperception.errors import importing, run_program

with importing():
    from bevperception.cli.run_plan import main

if __name__ == "__main__":
    run_program(main)
