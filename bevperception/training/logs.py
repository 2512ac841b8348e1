"""Write a run's log as CSV, without losing earlier lines if the disk is full."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from bevperception.files import explained, writing


class WholeLinesWriter(ExperimentWriter):
    """Lightning's writer of ``metrics.csv``, which leaves no half lines and loses none on a full disk."""

    def save(self) -> None:
        """Add the new lines, or none of them.

        Raises:
            OutputError: they cannot be written.
        """
        path = Path(self.metrics_file_path)
        with explained(path):
            try:
                before = path.stat().st_size if path.exists() else 0
                super().save()
            except OSError:
                if path.exists():
                    os.truncate(path, before)
                raise

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        """Write the lines anew under more columns; Lightning would empty the file first."""
        path = Path(self.metrics_file_path)
        with path.open(newline="") as file:
            lines = list(csv.DictReader(file))
        with writing(path) as partial, partial.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=fieldnames)
            writer.writeheader()
            writer.writerows(lines)


class RunLogger(CSVLogger):
    """Lightning's logger with :class:`WholeLinesWriter`."""

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """The writer, made when it is first needed; processes but the first get one that does nothing."""
        if self._experiment is None:
            with explained(Path(self.log_dir)):
                self._experiment = WholeLinesWriter(log_dir=self.log_dir)
        return self._experiment
