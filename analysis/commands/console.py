"""Printing: tables whose digits are never cut off, and prose that breaks between words."""

from __future__ import annotations

import shutil
import textwrap
from typing import TYPE_CHECKING, Any, TextIO

if TYPE_CHECKING:
    from rich.console import Console

AS_WIDE_AS_NEEDED = 100_000
"""Columns: rich makes no table wider than its content, but cuts one that does not fit."""


def console(file: TextIO | None = None, **options: Any) -> Console:
    """A rich console that cuts nothing off: a line that is too long for a terminal is folded by the terminal.

    Parameters
    ----------
    file : text file, optional
        Where to print; plain text without colours. Default: the terminal or pipe of the process, with colours on a
        terminal unless ``NO_COLOR`` is set.
    """
    from rich.console import Console

    if file is not None:
        options |= {"file": file, "color_system": None, "force_jupyter": False}
    return Console(width=AS_WIDE_AS_NEEDED, **options)


def say(on: Console, text: str) -> None:
    """Print a sentence: broken between words to the width of a terminal, in one line to a pipe or file."""
    if on.is_terminal:
        width = shutil.get_terminal_size().columns
        text = textwrap.fill(text, width, break_long_words=False, break_on_hyphens=False) or text
    on.print(text, markup=False, highlight=False, soft_wrap=True)
