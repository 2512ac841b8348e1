"""The command `bevperception evaluate-bag` from a checkout."""

from bevperception.errors import importing, run_program

with importing():
    from bevperception.cli.evaluate_bag import main

if __name__ == "__main__":
    run_program(main)
