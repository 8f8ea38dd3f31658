"""What every command is made of: a parser whose errors are one line, help that is for reading, and the way it runs.

Every command ends with ``sys.exit(run_main(main))``, and its ``main`` calls :func:`run_command`. What its options may
be is checked by the types of :mod:`analysis.commands.cli`.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from analysis.commands import shipped, stopping
from analysis.commands.cli import OutputFile
from analysis.commands.names import one_line, plain

run_main = stopping.run
"""Runs a ``main`` without arguments, gives its exit code; after Ctrl-C one line, and 130."""


class Options(argparse.Namespace):
    """Options by name; ``given`` are the names of those that stand on the command line. It is not in ``vars()``."""

    __slots__ = ("given",)
    given: frozenset[str]


program: str | None = None
"""What stands in place of ``python -m module`` in help and errors: ``lance-ref finetune``, where that was typed."""


class HelpFormatter(argparse.HelpFormatter):
    """Help whose defaults are told once, in parentheses at the end, and whose lists keep their lines."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        value = action.default
        if value in (None, False, argparse.SUPPRESS, []) or text.endswith(")") or not action.option_strings:
            return text
        if isinstance(value, (list, tuple)):
            value = " ".join(map(str, value))
        return f"{text} ({value})"

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        """Each line is a paragraph of its own; one that is indented hangs below its second word."""
        import textwrap

        lines = []
        for line in text.splitlines():
            entry = re.match(r"  \S+\s+", line)
            hanging = " " * (len(entry[0]) if entry else 0)
            lines += textwrap.wrap(line, width, initial_indent=indent, subsequent_indent=indent + hanging) or [""]
        return "\n".join(lines)


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose errors are one line on stderr, without the usage; its help is for reading."""

    def __init__(self, *args: Any, **options: Any) -> None:
        options.setdefault("formatter_class", HelpFormatter)
        super().__init__(*args, **options)
        if program is not None:
            self.prog = program
        self._optionals.title = "options (in parentheses at the end: what holds where an option is not given)"

    def format_usage(self) -> str:
        """One line: what has to be given, and that there are options."""
        if self.usage is None:
            needed = [action for action in self._actions if action.required and action.option_strings]
            given = [f"{a.option_strings[0]} {a.metavar or a.dest.upper()}" for a in needed]
            places = [a.metavar or a.dest.upper() for a in self._actions if not a.option_strings]
            self.usage = " ".join(["%(prog)s", *map(str, (*places, *given)), "[OPTIONS]"])
        return super().format_usage()

    def format_help(self) -> str:
        self.format_usage()
        return super().format_help()

    def error(self, message: str) -> NoReturn:
        line = plain(" ".join(message.split()))
        line = re.sub(r"^argument ([^\s:/]+)[^\s:]*: is ", r"\1 is ", line)  # "--lr is 0, expected ..."
        self.exit(2, f"{self.prog}: error: {line}\n")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As of the base class; the result is an :class:`Options`."""
        if namespace is not None:
            return super().parse_args(args, namespace)
        missing: list[Any] = []  # of a kind that an option which may stand there several times can be added to
        seen = argparse.Namespace(**{action.dest: missing for action in self._actions})
        options = super().parse_args(args, Options())
        super().parse_args(args, seen)  # once more, without defaults: what is still missing was not given
        options.given = frozenset(name for name, value in vars(seen).items() if value is not missing)
        self._check_outputs(options)
        return options

    def _check_outputs(self, options: argparse.Namespace) -> None:
        """One file cannot be two outputs."""
        names: dict[Path, str] = {}
        for action in self._actions:
            value = getattr(options, action.dest, None)
            if isinstance(action.type, OutputFile) and value is not None:
                option = action.option_strings[0]
                other = names.setdefault(Path(value).resolve(), option)
                if other != option:
                    self.error(f"{option} is {value!r}, which is the file of {other}, too")


def prose(doc: str | None) -> str:
    """A module's docstring as the beginning of a help: without marks, each paragraph on one line.

    >>> prose("Fine-tune: ``python -m x.y --quick``.\\n\\nEach ``net`` is\\nmeasured.")
    'Fine-tune.\\n\\nEach net is measured.'
    """
    text = re.sub(r":? ``python -m [^`]*``", "", doc or "")
    paragraphs = [" ".join(each.split()) if not each.startswith("    ") else each for each in text.split("\n\n")]
    return "\n\n".join(re.sub(r"``([^`]*)``|:\w+:`~?([^`]*)`", r"\1\2", each) for each in paragraphs).strip()


def nets_and_data(data: bool = True) -> str:
    """Built-in nets and data sets with what they are, for the end of a help."""
    from analysis.commands import words

    parts = [listing("built-in nets", words.NETS)]
    if data:
        where = "looked for in the folder that LANCE_REF_DATA names, else downloaded"
        parts.append(listing(f"data sets ({where}; digits needs neither)", words.DATA))
    return "\n\n".join(parts)


def listing(title: str, entries: Mapping[str, str]) -> str:
    """Names with what they mean, a line each, for the end of a help."""
    size = max(map(len, entries))
    return "\n".join([f"{title}:", *(f"  {name:<{size}}  {about}" for name, about in entries.items())])


def run_command(
    parser: argparse.ArgumentParser | Callable[[], argparse.ArgumentParser],
    arguments: Sequence[str] | None,
    work: Callable[[Any], int | None],
) -> int:
    """Load plug-ins, parse, and work; whatever the user did wrong is said in one line, with exit code 2.

    ``parser`` may be what makes the parser: it is called when the plug-ins, which options may depend on, are loaded.
    ``work`` gets the options and gives the exit code, or None for 0. The code is 1 if the reader of the output has
    gone.
    """
    try:
        stopping.load_plugins()
    except ImportError as error:
        _made(parser).error(one_line(_cause(error)))
    parser = _made(parser)
    options = parser.parse_args(arguments)
    try:
        shipped.check_own_packages()
        code = work(options)
        sys.stdout.flush()  # a reader who has gone away is noticed here, not at exit
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (
        ValueError, TypeError, LookupError, OSError, MemoryError, OverflowError, RuntimeError, ImportError,
        ArithmeticError,
    ) as error:  # fmt: skip
        if stopping.stopping():
            raise KeyboardInterrupt from error
        parser.error(one_line(_cause(error)))
    return code or 0


def _made(parser: argparse.ArgumentParser | Callable[[], argparse.ArgumentParser]) -> argparse.ArgumentParser:
    if isinstance(parser, argparse.ArgumentParser):
        return parser
    try:
        return parser()
    except ValueError as error:  # a plug-in's setting that is an option already
        OneLineParser(prog=stopping.command()).error(one_line(error))


def _cause(error: BaseException) -> BaseException:
    """The error; of a failed import, the module of another package that is in the way."""
    if isinstance(error, ImportError):
        try:
            shipped.check_own_packages()
        except ImportError as cause:
            return cause
    return error
