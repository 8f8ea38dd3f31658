"""Figures as files: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 140


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure in the format that the name's ending says, under a temporary name first.

    Raises
    ------
    ValueError
        If matplotlib knows no such format.
    OSError
        If the file cannot be written; an earlier one is intact, and no part of a new one is left.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.partial{target.suffix}")
    try:
        figure.savefig(temporary, dpi=DOTS_PER_INCH)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
