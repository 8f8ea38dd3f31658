"""Ctrl-C in a command: one line on standard error that says what is kept, and exit code 130.

This file needs nothing but Python's own library. The commands of ``analysis`` load it by its path
(:mod:`analysis.commands.stopping`), as importing the package takes a second, in which Ctrl-C is to be one line, too.
"""

from __future__ import annotations

import _thread
import atexit
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

STOPPED = 130
"""Exit code of a command that was stopped: 128 + SIGINT, as shells have it."""
FROM_THE_BEGINNING = "the same command starts from the beginning"

_kept = FROM_THE_BEGINNING
_presses = 0


def _while_starting() -> None:
    """On the first import of ``python -m``: Ctrl-C ends the process at once, as there is nothing to tidy up.

    In any other process this does nothing, so that importing a package never changes what Ctrl-C does.
    """
    started_by_name = sys.argv[:1] == ["-m"]  # while the packages around the named module are imported
    if started_by_name and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def keep(what: str) -> None:
    """Say what a command that is stopped from now on leaves behind, and what the same command will do.

    Parameters
    ----------
    what : str
        For example ``"the finished cells are kept in runs, and the same command goes on from there"``.
    """
    global _kept
    _kept = what


def stopping() -> bool:
    """Whether Ctrl-C was pressed since :func:`run` began; an error that follows comes from there."""
    return _presses > 0


def run(main: Callable[[], int]) -> int:
    """Run a command; gives its exit code, or 130 after Ctrl-C and one line on standard error.

    The first Ctrl-C raises KeyboardInterrupt in the main thread, so that files and processes are tidied up. The second
    ends the process at once. Where SIGINT is ignored, as in the background of a shell, it stays ignored.

    Parameters
    ----------
    main : callable
        Gets nothing, gives the exit code.
    """
    global _kept, _presses
    _kept, _presses = FROM_THE_BEGINNING, 0
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
        signal.signal(signal.SIGINT, _press)
        sys.unraisablehook = _unraisable
    try:
        code = main()
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it is done: Ctrl-C must not change the exit code any more
        return code
    except BaseException as error:
        if not isinstance(error, KeyboardInterrupt) and not stopping():
            raise  # any other error after Ctrl-C is what some library has made of it
        _say()
        _end()
        return STOPPED


@contextmanager
def left_to_parent() -> Iterator[None]:
    """Processes that are started inside never see Ctrl-C, which a terminal sends to all: their parent ends them."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def command() -> str:
    """What was typed to start this process, without its options."""
    words = sys.orig_argv
    position = words.index("-m") + 1 if "-m" in words else len(words)
    return f"python -m {words[position]}" if position < len(words) else os.path.basename(sys.argv[0])


def _press(number: int, frame: FrameType | None) -> None:
    global _presses
    _presses += 1
    if _presses > 1:
        os._exit(STOPPED)
    raise KeyboardInterrupt


def _leave(number: int, frame: FrameType | None) -> None:
    _say()
    os._exit(STOPPED)


def _end() -> None:
    """Leave with the exit code; Python would end by SIGINT where an ``exec`` was interrupted, caught or not."""
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(STOPPED)


def _say() -> None:
    line = f"{command()}: stopped; {_kept}\n"
    os.write(2, line.encode(errors="backslashreplace"))


def _unraisable(what: Any) -> None:
    """An interrupt inside a destructor or a callback, where Python cannot raise it, is raised again outside."""
    global _presses
    if what.exc_type is KeyboardInterrupt:
        _presses = 0  # it is the same one again
        _thread.interrupt_main()
        return
    sys.__unraisablehook__(what)


_while_starting()
