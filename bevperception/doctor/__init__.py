"""Report what is installed, which operators run, and whether a data root can be used.

    python -m bevperception.doctor
    python -m bevperception.doctor /data/nuscenes --version v1.0-mini

Leaves with 0 when everything that was asked about is usable, and 2 when the data root is not. What is
missing but can be done without is listed with what it costs.
"""
