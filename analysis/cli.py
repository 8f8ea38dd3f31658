"""What the command lines share: errors in one line with exit code 2, and outputs that are checked first."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import NoReturn


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line on stderr, without the usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def one_line(error: BaseException) -> str:
    """What an exception says, on one line; a KeyError without its quotes."""
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return " ".join(text.split()) or type(error).__name__


def check_writable(output: str) -> None:
    """Fail before the work, not after it.

    Raises
    ------
    ValueError
        If a file of that name cannot be made.
    """
    path = Path(output)
    if path.is_dir():
        raise ValueError(f"--output is {output!r}, a folder; expected the name of a file")
    if not path.parent.is_dir():
        raise ValueError(f"--output is {output!r}, but there is no folder {str(path.parent)!r}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"--output is {output!r}, which cannot be written")
