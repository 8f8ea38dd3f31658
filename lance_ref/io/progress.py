"""What the terminal shows: a progress bar for what takes minutes, and the lines of a table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager

Advance = Callable[[int, str], None]
"""Called with how much further it is, and a few words on how it goes."""


@contextmanager
def progress_bar(title: str, total: int | None, wanted: bool | None, done: int = 0) -> Iterator[Advance]:
    """A bar of ``total`` units on standard error, and the function that moves it on.

    Parameters
    ----------
    title : str
    total, done : int
        Units altogether, None if that is not known, and those that lie behind at the start.
    wanted : bool or None
        None: if standard error is a terminal.
    """
    if wanted is None:
        wanted = sys.stderr is not None and sys.stderr.isatty()
    if not wanted:
        yield lambda count, words: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[words]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total, completed=done, words="")
        yield lambda count, words: bar.update(task, advance=count, words=words)


def aligned(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """The rows of a table as lines with columns of one width each; the columns ``right`` end at the same place.

    >>> aligned([("layer", "bytes"), ("conv1", "8")], right=(1,))
    ['layer  bytes', 'conv1      8']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([f"{cell:{'>' if i in right else '<'}{widths[i]}}" for i, cell in enumerate(row)] for row in rows)
    return ["  ".join(line).rstrip() for line in lines]
