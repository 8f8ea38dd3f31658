"""What the command lines share: errors in one line with exit code 2, and outputs that are checked first."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from analysis.names import plain

NET_HELP = "name of a built-in net (mobilenetv2@0.35: of that width), pkg.module:factory, or a file.onnx"
"""Of ``--net``, wherever any net will do."""


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line on stderr, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {plain(' '.join(message.split()))}\n")


def one_line(error: BaseException) -> str:
    """What an exception says, on one line; a KeyError without its quotes."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__


def run_command(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    work: Callable[[argparse.Namespace], int | None],
    outputs: Sequence[str] = (),
) -> int:
    """Parse, look whether the outputs can be written, and work; whatever the user did wrong is said in one line.

    Parameters
    ----------
    parser : ArgumentParser
        A :class:`OneLineParser`.
    arguments : sequence of str, optional
        Those of the process by default.
    work : callable
        Gets the options; gives the exit code, or None for 0.
    outputs : sequence of str
        Names of the options that name files to write.

    Returns
    -------
    int
        The exit code; 1 if the reader of the output has gone away. Errors leave through ``parser.error``, with exit
        code 2.
    """
    options = parser.parse_args(arguments)
    try:
        for name in outputs:
            if getattr(options, name):
                check_writable(getattr(options, name), f"--{name}")
        code = work(options)
        sys.stdout.flush()  # a reader who has gone away is noticed here, not at exit
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, LookupError, OSError, MemoryError, OverflowError, RuntimeError) as error:
        parser.error(one_line(error))
    return code or 0


def check_counts(options: argparse.Namespace, names: Sequence[str]) -> None:
    """Raise ValueError unless these options are positive integers, or were not given."""
    for name in names:
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}, expected a positive integer")


def check_writable(output: str, option: str = "--output") -> None:
    """Fail before the work, not after it.

    Raises
    ------
    ValueError
        If a file of that name cannot be made.
    """
    path = Path(output)
    if path.is_dir():
        raise ValueError(f"{option} is {output!r}, a folder; expected the name of a file")
    if not path.parent.is_dir():
        raise ValueError(f"{option} is {output!r}, but there is no folder {str(path.parent)!r}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{option} is {output!r}, which cannot be written")
