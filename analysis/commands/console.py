"""Printing: tables of which no digit is ever cut off, whatever the width, and sentences that break between words."""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from analysis.commands.blocks import GAP, PIPE_WIDTH, blocks, paragraph, shortened, width
from analysis.commands.names import plain

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.text import Text

RULE = "─"
NAME = 20
"""Characters that a row's name keeps, at least, where it is shortened to make room for a column."""
DrawText = Callable[["Console"], None]
"""Prints something to a rich console."""


@dataclass
class Sheet:
    """A table with as many columns as fit the console, those that must stand there in blocks; a rich renderable."""

    title: str
    columns: Sequence[str]  #: The first column names the rows and stands in every block.
    #: Number of columns, from the first on, that are words; the others are numbers, at the right of their column.
    left: int = 1
    #: Columns that may be left out, the most important first; those that are named together stand there together.
    optional: Sequence[Sequence[str]] = ()
    rows: list[list[str]] = field(default_factory=list)
    styles: list[str] = field(default_factory=list)  #: A rich style for each row; empty for none.

    def add(self, *cells: str, style: str = "") -> None:
        """Add a row; cells that are missing at its end stay empty.

        Raises ValueError if there are more cells than columns.
        """
        if len(cells) > len(self.columns):
            raise ValueError(f"a row has {len(cells)} cells, the table {len(self.columns)} columns")
        self.rows.append([plain(cell) for cell in cells] + [""] * (len(self.columns) - len(cells)))
        self.styles.append(style)

    def rule(self) -> None:
        """Add a line, for instance above the totals."""
        self.rows.append([RULE] * len(self.columns))
        self.styles.append("")

    def lines(self, across: int) -> list[tuple[str, str]]:
        """Lines of at most ``across`` characters with their styles; one with a single number may be longer."""
        every = [[plain(name) for name in self.columns], [RULE] * len(self.columns), *self.rows]
        sizes = [max(len(row[i]) for row in every) for i in range(len(self.columns))]
        shown, sizes[0] = self._layout(sizes, [row[0] for row in every], across)
        table = [[self._padded(shortened(row[i], sizes[i]), sizes[i], i) for i in shown] for row in every]
        styles = ["bold cyan", "", *self.styles]
        lines = [(line, "italic") for line in paragraph(plain(self.title), across).split("\n")]
        for i, block in enumerate(blocks(table[0], table[1:], across).split("\n\n")):
            lines += [("", "")] * (i > 0) + list(zip(block.split("\n"), styles, strict=True))
        more = len(self.columns) - len(shown)
        return lines + [(f"({more} more column{'' if more == 1 else 's'} with --wide)", "dim")] * (more > 0)

    def _layout(self, sizes: Sequence[int], names: Sequence[str], across: int) -> tuple[list[int], int]:
        """The columns that are shown, and how many characters the names of the rows get, all of them different."""
        groups = [[self.columns.index(name) for name in group] for group in self.optional]
        shown = [i for i in range(len(self.columns)) if not any(i in group for group in groups)]
        different = (n for n in range(NAME, sizes[0]) if len({shortened(name, n) for name in names}) == len(set(names)))
        shortest = next(different, sizes[0]) if groups else sizes[0]

        def room(columns: Sequence[int]) -> int:
            return across - sum(len(GAP) + sizes[i] for i in columns if i)

        for group in groups:
            if room([*shown, *group]) < shortest:
                break
            shown += group
        left = room(shown) if room(shown) >= shortest else min(room([i]) for i in shown)
        return sorted(shown), max(min(sizes[0], left), shortest)

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


def say(on: Console, text: str) -> None:
    """Print a sentence, broken between words to the width."""
    on.print(paragraph(plain(text), on.width, "  "), markup=False, highlight=False, soft_wrap=True)


def as_text(draw: DrawText, across: int | None = None) -> str:
    """What is drawn, as text without colours, with lines in ASCII, since a pipe's encoding is anybody's guess.

    ``across``: characters of a line, 100 by default.
    """
    from rich.console import Console

    text = io.StringIO()
    size = PIPE_WIDTH if across is None else across
    draw(Console(file=text, width=size, color_system=None, force_jupyter=False, force_terminal=False))
    return "".join(
        f"{line.rstrip()}\n" for line in text.getvalue().replace(RULE, "-").replace("…", "~").split("\n")[:-1]
    )


def show(draw: DrawText) -> None:
    """Print what is drawn: to a terminal in colour, unless ``NO_COLOR`` is set; to a pipe as plain text."""
    if sys.stdout.isatty():
        from rich.console import Console

        draw(Console())
    else:
        sys.stdout.write(as_text(draw, width()))


def emit(draw: DrawText, texts: Mapping[str, Callable[[], str]], kind: str, output: str | None) -> None:
    """Print what is drawn, or one of the ``texts`` if ``kind`` names it; or write it to a file, whole or not at all."""
    if kind not in texts and output is None:
        show(draw)
        return
    text = texts[kind]() if kind in texts else as_text(draw)
    if output is None:
        sys.stdout.write(text)
    else:
        from lance_ref.io.whole_file import write_text

        write_text(output, text)


def csv_text(rows: Iterable[Mapping[str, Any]], names: Sequence[str]) -> str:
    """Rows as CSV with these columns; nothing stands where a row lacks one."""
    text = io.StringIO()
    writer = csv.DictWriter(text, names, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()
