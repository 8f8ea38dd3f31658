"""Options of the command lines: their types, those that several commands have, and checks of one beside another.

Types for ``add_argument(type=...)`` check an option before anything is looked up or run: numbers (:func:`integer`,
:func:`number`), names (:func:`name_of`), data sets, shapes, and files that can be written (:class:`OutputFile`). The
parser that reads the options is in :mod:`analysis.commands.command_line`.

An option that has no effect beside the others is refused by :func:`check_effect` or :func:`check_no_effect`;
:func:`fill_in` gives defaults that depend on other options, such as ``--quick``.
"""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from analysis.commands.names import one_line, shown

NET_HELP = (
    "a built-in net by name (mobilenetv2@0.35: with 0.35 times the channels); pkg.module:factory, a function of yours "
    "that returns a lance_ref.nn.Module or a torch.nn.Module; or a file.onnx"
)
"""Help of ``--net``, in every command that takes any net."""
DATA_HELP = (
    "a data set by name; a folder with a sub-folder of pictures for each class, perhaps below train/ and test/; or a "
    "file.npz with uint8 images x_train, x_test (N,H,W,C) and labels y_train, y_test, or with x and y. Without a test "
    "part, a fifth of each class is the test set"
)
"""Help of ``--data``, in every command that needs images with labels."""
LARGEST = 2**31 - 1
"""The largest count of any kind: a larger one is a slip of the keyboard, and would only exhaust the memory."""


# ---- types of options ----------------------------------------------------------------------------


def _refused(text: str, expected: str) -> argparse.ArgumentTypeError:
    """The error of a type; :class:`~analysis.commands.command_line.OneLineParser` puts the option's name before it."""
    shown = text if re.fullmatch(r"[-+.\w]{1,40}", text) and _is_number(text) else repr(text)
    if len(shown) > 60:
        shown = f"{shown[:40]}... ({len(text)} characters)"
    return argparse.ArgumentTypeError(f"is {shown}, expected {expected}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def integer(least: int = 1, most: int = LARGEST) -> Callable[[str], int]:
    """A type: a whole number within limits."""
    expected = {0: "an integer of at least 0", 1: "a positive integer"}.get(least, f"an integer of at least {least}")
    expected += f" and at most {most}" if most != LARGEST else ""

    def convert(text: str) -> int:
        if not re.fullmatch(r"\s*[-+]?[0-9]+\s*", text):
            raise _refused(text, expected)
        if len(text) > 30 or int(text) > most:
            raise _refused(text, f"{expected.removesuffix(f' and at most {most}')}, at most {most}")
        if int(text) < least:
            raise _refused(text, expected)
        return int(text)

    return convert


def number(expected: str, condition: Callable[[float], bool]) -> Callable[[str], float]:
    """A type: a finite number of which a condition holds; ``expected`` says which, for the message."""

    def convert(text: str) -> float:
        if not _is_number(text) or not math.isfinite(float(text)) or not condition(float(text)):
            raise _refused(text, expected)
        return float(text)

    return convert


count = integer(1)
few = integer(1, 1000)
pixels = integer(1, 8192)
seed = integer(0, 2**32 - 1)
finite = number("a finite number", lambda value: True)
positive = number("a positive number", lambda value: value > 0)
share = number("a number in (0, 1]", lambda value: 0 < value <= 1)
share_below_one = number("a number in [0, 1)", lambda value: 0 <= value < 1)


def chunk(text: str) -> int | str:
    """A type: most images at a time, or ``auto``."""
    return text if text == "auto" else count(text)


def name_of(names: Callable[[], Iterable[str]]) -> Callable[[str], str]:
    """A type: one of the names that a function gives; it is called only when there is something to check."""

    def convert(text: str) -> str:
        allowed = list(names())
        if text not in allowed:
            raise _refused(text, f"one of {', '.join(allowed)}")
        return text

    return convert


def built_in_net(text: str) -> str:
    """A type: a net by its name."""
    from lance_ref import models

    return name_of(models.names)(text)


def any_net(text: str) -> str:
    """A type: a net by its name, ``pkg.module:factory``, or the name of an ONNX file that is there."""
    if text.endswith(".onnx"):
        if not os.path.isfile(text):
            raise _refused(text, "the name of an ONNX file that is there")
        return text
    from lance_ref import models

    if ":" not in text and text.partition("@")[0] not in models.names():
        raise _refused(text, f"one of {', '.join(models.names())}, pkg.module:factory, or a file.onnx")
    return text


def data_set(text: str) -> str:
    """A type: data as :func:`lance_ref.datasets.open_data` takes them."""
    from lance_ref import datasets

    if not datasets.is_data(text):
        there = "" if not os.path.exists(text) else "; it is there, but is none of these"
        raise _refused(text, f"one of {', '.join(datasets.names())}, a folder of pictures, or a file.npz{there}")
    return text


def add_pixels(parser: argparse.ArgumentParser) -> None:
    """The options that say how images become the input of a net: ``--channels``, ``--mean`` and ``--std``."""
    parser.add_argument(
        "--channels", type=integer(1, 1024), metavar="C",
        help="channels that images get: 1 is the mean of several, 3 repeats a grey one (those that the net must have, "
        "else those of the images)",
    )  # fmt: skip
    add_normalisation(parser)


def add_normalisation(parser: argparse.ArgumentParser) -> None:
    """The options ``--mean`` and ``--std``."""
    parser.add_argument(
        "--mean", nargs="+", type=finite, metavar="M",
        help="with --std: the input is (pixel / 255 - mean) / std, a number for all channels or one for each (what "
        "pretrained weights were trained with, else pixel / 255)",
    )  # fmt: skip
    parser.add_argument("--std", nargs="+", type=positive, metavar="S", help="with --mean")


def named_data_set(text: str) -> str:
    """A type: a data set by its name."""
    from lance_ref import datasets

    return name_of(datasets.names)(text)


def scheduler_address(text: str) -> str:
    """A type: the address of a Dask scheduler; whether it answers is seen when there is something to run."""
    if not re.fullmatch(r"((tcp|tls|ws|wss|ucx)://)?(\[[0-9a-fA-F:]+\]|[\w.-]+):[0-9]{1,5}/?", text):
        raise _refused(text, "an address as tcp://host:8786")
    if find_spec("distributed") is None:
        raise argparse.ArgumentTypeError(
            f"is {text!r}, which takes dask.distributed: python -m pip install distributed"
        )
    return text


class OutputFile:
    """A type: the name of a file that can be written, with one of ``suffixes`` if there are any."""

    def __init__(self, *suffixes: str) -> None:
        self.suffixes = suffixes

    def __call__(self, text: str) -> str:
        if not text or "\0" in text:
            raise _refused(text, "the name of a file")
        if self.suffixes and Path(text).suffix not in self.suffixes:
            raise _refused(text, f"a name that ends in {' or '.join(self.suffixes)}")
        try:
            check_writable(text, "")
        except (ValueError, OSError) as error:
            raise argparse.ArgumentTypeError(one_line(error)) from None
        return text


any_file = OutputFile()
json_file = OutputFile(".json")
markdown_file = OutputFile(".md")
figure_file = OutputFile(".png", ".svg")


def folder_to_write(text: str) -> str:
    """A type: a folder in which files can be made, or that can itself be made."""
    if not text or "\0" in text:
        raise _refused(text, "the name of a folder")
    try:
        path = Path(text)
        if path.exists() and not path.is_dir():
            raise _refused(text, "a folder, but it is a file")
        there = next(each for each in (path, *path.absolute().parents) if each.exists())
        if not there.is_dir():
            raise _refused(text, f"a folder, but {str(there)!r} is a file")
        if not os.access(there, os.W_OK | os.X_OK):
            raise _refused(text, f"a folder to write into, but {str(there)!r} cannot be written")
    except (OSError, ValueError) as error:  # too long a name, a zero byte
        raise argparse.ArgumentTypeError(f"is {text[:60]!r}, which no folder can be named: {one_line(error)}") from None
    return text


def add_sweep(parser: argparse.ArgumentParser, folder: str, of: str = "finished runs") -> None:
    """The options of a command that runs many cells: ``--folder``, ``--jobs`` and ``--scheduler``."""
    parser.add_argument("--folder", type=folder_to_write, default=folder, help=f"where {of} are kept (%(default)s)")
    parser.add_argument("--jobs", type=few, default=2, help="runs at a time, each in a process of one thread (2)")
    parser.add_argument(
        "--scheduler", type=scheduler_address, help="address of a Dask scheduler, to run on a cluster (this machine)"
    )


def check_sweep(options: argparse.Namespace) -> None:
    """Raise ValueError for ``--jobs`` beside ``--scheduler``, which has processes of its own."""
    check_effect(options, "jobs", options.scheduler is None, "a run without --scheduler")


# ---- options beside each other -------------------------------------------------------------------


def fill_in(options: argparse.Namespace, defaults: Mapping[str, Any]) -> None:
    """Give every option that is None its default; what stands on the command line stays."""
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)


def check_effect(options: argparse.Namespace, name: str, effective: bool, needs: str) -> None:
    """Raise ValueError if the option ``name`` was given and changes nothing (``effective`` is False).

    ``needs`` says what it would take: ``"--recipe tuned"``. Only a parser of
    :mod:`analysis.commands.command_line` knows what was given; with the options of another parser nothing is refused.
    """
    if not effective and name in getattr(options, "given", ()):
        raise ValueError(f"--{name.replace('_', '-')} has no effect here: it needs {needs}")


def check_no_effect(options: argparse.Namespace, names: Iterable[str], why: str) -> None:
    """Raise ValueError if one of these options was given, though it changes nothing, and say why."""
    for name in names:
        if name in getattr(options, "given", ()):
            raise ValueError(f"--{name.replace('_', '-')} has no effect here: {why}")


def input_shape(text: str) -> tuple[int, ...]:
    """A type: the shape of one input, without the batch, of any number of dimensions.

    >>> input_shape("3,32,32"), input_shape("90, 3"), input_shape("784")
    ((3, 32, 32), (90, 3), (784,))
    """
    parts = text.split(",")
    if not all(re.fullmatch(r"\s*[1-9][0-9]{0,8}\s*", n, re.ASCII) for n in parts):
        raise argparse.ArgumentTypeError(f"is {shown(text)}, expected C,H,W or N or L,F, positive integers")
    return tuple(int(n) for n in parts)


class InputSpec(NamedTuple):
    """One input of a net: its name in ``forward()`` (None: by position), shape without the batch, and dtype."""

    name: str | None
    shape: tuple[int, ...]
    dtype: str | None


INPUT_DTYPES = ("float16", "bfloat16", "float32", "float64", "uint8", "int32", "int64", "bool")


def input_spec(text: str) -> InputSpec:
    """A type: an input as ``[name=]shape[:dtype]``; with an empty shape there is one number for each sample.

    >>> input_spec("3,32,32")
    InputSpec(name=None, shape=(3, 32, 32), dtype=None)
    >>> input_spec("input_ids=128:int64")
    InputSpec(name='input_ids', shape=(128,), dtype='int64')
    """
    before, equals, rest = text.rpartition("=")
    shape, colon, dtype = rest.partition(":")
    if (equals and not before.isidentifier()) or (colon and dtype not in INPUT_DTYPES):
        raise argparse.ArgumentTypeError(
            f"is {shown(text)}, expected [name=]shape[:dtype], the dtype one of {', '.join(INPUT_DTYPES)}"
        )
    sizes = () if not shape.strip() and (equals or colon) else input_shape(shape)
    return InputSpec(before or None, sizes, dtype or None)


def check_once(options: argparse.Namespace, name: str) -> None:
    """Raise ValueError if a list has something twice."""
    values = getattr(options, name)
    if len(set(values)) < len(values):
        shown = " ".join(str(value) for value in values)
        raise ValueError(f"--{name.replace('_', '-')} is {shown}, expected each once")


def check_writable(output: str, option: str = "--output") -> None:
    """Fail before the work, not after it.

    Raises ValueError if a file of that name cannot be made.
    """
    path = Path(output)
    if path.is_dir():
        raise ValueError(f"{option} is {output!r}, a folder; expected the name of a file".strip())
    if not path.parent.is_dir():
        raise ValueError(f"{option} is {output!r}, but there is no folder {str(path.parent)!r}".strip())
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{option} is {output!r}, which cannot be written".strip())
