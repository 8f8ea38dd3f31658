"""Printing: tables of which no digit is ever cut off, sentences that break between words, and the units of numbers.

A number is written in the largest unit of which it is at least a tenth, so that three decimals show three digits.
"""

from __future__ import annotations

import csv
import io
import shutil
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from analysis.commands.names import plain

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions
    from rich.text import Text

PIPE_WIDTH = 100
"""The width of tables where the output is no terminal and COLUMNS is not set."""
GAP = "  "
BYTES = {"MiB": 2**20, "KiB": 2**10}
SCALES = ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))
"""Units of bytes, and scales of operations, the largest first."""
RULE = "─"
NAME = 20
"""Characters that a row's name keeps, at least, where it is shortened to make room for a column."""
DrawText = Callable[["Console"], None]
"""Prints something to a rich console."""


# ---- plain text ------------------------------------------------------------------------------------


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


# ---- numbers with their unit -----------------------------------------------------------------------


def readable(n: int) -> str:
    """Bytes with their unit.

    >>> readable(3 * 2**19), readable(1536), readable(0)
    ('1.500 MiB', '1.500 KiB', 'nothing')
    """
    return f"{in_unit(n, unit_of(n))} {unit_of(n)}" if n else "nothing"


def unit_of(n: int) -> str:
    """The unit in which this number of bytes is written: MiB from a tenth of a MiB on, else KiB."""
    return "MiB" if 10 * n >= BYTES["MiB"] else "KiB"


def in_unit(n: int, unit: str) -> str:
    return f"{n / BYTES[unit]:,.3f}"


def scale_of(n: int) -> tuple[float, str]:
    """The scale on which this number of operations is written, and its name: billions, millions or thousands."""
    return next((scale for scale in SCALES if 10 * n >= scale[0]), SCALES[-1])


# ---- tables on a console ---------------------------------------------------------------------------


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
