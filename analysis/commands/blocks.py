"""A wide table for any width: as many columns beside each other as fit, the rest in further blocks below."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Sequence

PIPE_WIDTH = 100
"""The width of tables where the output is no terminal and COLUMNS is not set."""
GAP = "  "


def width() -> int:
    """Columns of the terminal, or of a pipe's reader."""
    return shutil.get_terminal_size((PIPE_WIDTH, 24)).columns


def blocks(columns: Sequence[str], rows: Sequence[Sequence[str]], across: int | None = None) -> str:
    """The table as text; every cell stands there whole, whatever the width.

    The first column, which names the rows, stands in every block. Lines have at most ``across`` characters
    (:func:`width`); only a line of the first column and one other may be longer.

    >>> print(blocks(["net", "bytes", "macs"], [["mlp", "12,345", "67"]], 13))
    net   bytes
    mlp  12,345
    <BLANKLINE>
    net  macs
    mlp    67
    """
    across = width() if across is None else across
    table = [list(columns), *(list(row) for row in rows)]
    sizes = [max(len(row[i]) for row in table) for i in range(len(columns))]
    parts: list[list[int]] = []
    used = across + 1  # so that the first column opens a block
    for i in range(1, len(columns)):
        if used + len(GAP) + sizes[i] > across:
            parts.append([])
            used = sizes[0]
        parts[-1].append(i)
        used += len(GAP) + sizes[i]
    texts = []
    for part in parts or [[]]:
        lines = [GAP.join([row[0].ljust(sizes[0]), *(row[i].rjust(sizes[i]) for i in part)]).rstrip() for row in table]
        texts.append("\n".join(lines))
    return "\n\n".join(texts)


def paragraph(text: str, across: int | None = None, indent: str = "") -> str:
    """The text in lines of at most that many characters, all but the first indented; no word is broken."""
    across = width() if across is None else across
    return textwrap.fill(text, across, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def shortened(name: str, size: int) -> str:
    """The name in at most that many characters, without its middle if it is longer.

    >>> shortened("features.17.conv.0.0", 17)
    'features…conv.0.0'
    """
    end = (size - 1) // 2
    return name if len(name) <= size else f"{name[: size - 1 - end]}…{name[len(name) - end :]}"
