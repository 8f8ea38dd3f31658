"""Printing: tables of which no digit is ever cut off, whatever the width, and sentences that break between words."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from analysis.commands.blocks import PIPE_WIDTH, blocks, paragraph, width
from analysis.commands.names import plain

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.text import Text

RULE = "─"
Draw = Callable[["Console"], None]
"""Prints something to a rich console."""


@dataclass
class Sheet:
    """A table that becomes several blocks where it is wider than the console; a rich renderable.

    Attributes
    ----------
    title : str
    columns : sequence of str
        The first column names the rows and stands in every block.
    left : int
        Number of columns, from the first on, that are words; the others are numbers, at the right of their column.
    rows : list of list of str
    styles : list of str
        A rich style for each row; empty for none.
    """

    title: str
    columns: Sequence[str]
    left: int = 1
    rows: list[list[str]] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)

    def add(self, *cells: str, style: str = "") -> None:
        """Add a row; cells that are missing at its end stay empty.

        Raises
        ------
        ValueError
            If there are more cells than columns.
        """
        if len(cells) > len(self.columns):
            raise ValueError(f"a row has {len(cells)} cells, the table {len(self.columns)} columns")
        self.rows.append([plain(cell) for cell in cells] + [""] * (len(self.columns) - len(cells)))
        self.styles.append(style)

    def rule(self) -> None:
        """Add a line, for instance above the totals."""
        self.rows.append([RULE] * len(self.columns))
        self.styles.append("")

    @property
    def row_count(self) -> int:
        """Number of rows, lines between them left out."""
        return sum(not _is_rule(row) for row in self.rows)

    def lines(self, across: int) -> list[tuple[str, str]]:
        """Lines of at most ``across`` characters with their styles; one with a single number may be longer."""
        columns = [plain(name) for name in self.columns]
        every = [columns, [RULE] * len(columns), *self.rows]
        sizes = [max(len(row[i]) for row in every) for i in range(len(columns))]
        table = [
            [self._padded(cell, n, i) for i, (cell, n) in enumerate(zip(row, sizes, strict=True))] for row in every
        ]
        styles = ["bold cyan", "", *self.styles]
        lines = [(plain(self.title), "italic")]
        for i, block in enumerate(blocks(table[0], table[1:], across).split("\n\n")):
            lines += [("", "")] * (i > 0) + list(zip(block.split("\n"), styles, strict=True))
        return lines

    def _padded(self, cell: str, size: int, column: int) -> str:
        """A rule across the column, words at its left, numbers at its right."""
        if cell == RULE:
            return RULE * size
        return cell.ljust(size) if column < self.left else cell.rjust(size)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Text]:
        from rich.text import Text

        for line, style in [("", ""), *self.lines(options.max_width), ("", "")]:
            # a line that is too long breaks between words: a name and its number stand below each other
            yield Text(line, style=style, overflow="fold")


def _is_rule(row: Sequence[str]) -> bool:
    return set(row) == {RULE}


def say(on: Console, text: str) -> None:
    """Print a sentence: broken between words to the width of a terminal, one line of a pipe or a file."""
    text = plain(text)
    on.print(paragraph(text, on.width) if on.is_terminal else text, markup=False, highlight=False, soft_wrap=True)


def as_text(draw: Draw, across: int | None = None) -> str:
    """What is drawn, as text without colours and with lines in ASCII, since a pipe's encoding is anybody's guess.

    Parameters
    ----------
    draw : callable
        Gets a rich console.
    across : int, optional
        Characters of a line, 200 by default.
    """
    from rich.console import Console

    text = io.StringIO()
    size = PIPE_WIDTH if across is None else across
    draw(Console(file=text, width=size, color_system=None, force_jupyter=False, force_terminal=False))
    return "".join(f"{line.rstrip()}\n" for line in text.getvalue().replace(RULE, "-").split("\n")[:-1])


def show(draw: Draw) -> None:
    """Print what is drawn: to a terminal in colour, unless ``NO_COLOR`` is set; to a pipe as plain text."""
    if sys.stdout.isatty():
        from rich.console import Console

        draw(Console())
    else:
        sys.stdout.write(as_text(draw, width()))
