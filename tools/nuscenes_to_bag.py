"""The command `bevperception nuscenes-to-bag` from a checkout."""

from bevperception.errors import importing, run_program

with importing():
    from bevperception.cli.nuscenes_to_bag import main

if __name__ == "__main__":
    run_program(main)
