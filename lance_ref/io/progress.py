"""A progress bar on the terminal, for what takes minutes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[[int, str], None]
"""Called with how much further it is, and a few words on how it goes."""


@contextmanager
def progress_bar(title: str, total: int, wanted: bool | None, done: int = 0) -> Iterator[Advance]:
    """A bar of ``total`` units on standard error, and the function that moves it on.

    Parameters
    ----------
    title : str
    total, done : int
        Units altogether, and those that lie behind at the start.
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
