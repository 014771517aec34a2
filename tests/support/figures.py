"""What the tests of faults measured, as `make faults` writes it to tests/faults.md."""

from pathlib import Path
from typing import NamedTuple

from .table import table

HEAD = "# What faults did\n\nWritten by `make faults`, one gateway worker unless said otherwise, on 2 cores.\n\n"


class Figure(NamedTuple):
    """One line: seconds until the caller knew, and the longest that another caller waited meanwhile."""

    fault: str
    outcome: str
    seconds: float | None = None
    others: float | None = None


def write(path: Path, figures: list[Figure]) -> None:
    """Write the figures to a file of their own, as a table."""
    rows = [
        (
            figure.fault,
            figure.outcome,
            "" if figure.seconds is None else f"{figure.seconds:.1f}",
            "" if figure.others is None else f"{figure.others:.2f}",
        )
        for figure in figures
    ]
    path.write_text(HEAD + table(("fault", "outcome", "after, s", "others waited at most, s"), rows, text=2) + "\n")
