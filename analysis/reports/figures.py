"""Figures as files: whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lance_ref.io.whole_file import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DOTS_PER_INCH = 140


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure in the format that the name's ending says.

    Raises
    ------
    ValueError
        If matplotlib knows no such format.
    OSError
        If the file cannot be written; an earlier one is intact, and no part of a new one is left.
    """
    with whole_file(path) as file:
        figure.savefig(file, format=Path(path).suffix[1:], dpi=DOTS_PER_INCH)
