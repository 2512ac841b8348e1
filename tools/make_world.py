"""The command `bevperception make-world` from a checkout."""

from bevperception.errors import importing, run_program

with importing():
    from bevperception.cli.make_world import main

if __name__ == "__main__":
    run_program(main)
