"""What the command lines share: errors in one line with exit code 2, and outputs that are checked first."""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from analysis.commands.names import plain

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


EXPECTED = (ValueError, TypeError, LookupError, OSError, MemoryError, OverflowError, RuntimeError, ImportError)
"""What the user's input, files or machine may cause: said in one line."""


def run_command(
    parser: argparse.ArgumentParser,
    arguments: Sequence[str] | None,
    work: Callable[[argparse.Namespace], int | None],
    outputs: Sequence[str] = (),
    resumes: bool = False,
) -> int:
    """Parse, check every option, and work; whatever the user did wrong is said in one line.

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
    resumes : bool
        Whether ``--folder`` keeps what is finished, for a run that is stopped. Default: nothing is kept.

    Returns
    -------
    int
        The exit code; 1 if the reader of the output has gone away, 130 after Ctrl-C. Errors leave through
        ``parser.error``, with exit code 2.
    """
    options = argparse.Namespace()
    try:
        parser.parse_args(arguments, options)
        check_options(options)
        for name in outputs:
            if getattr(options, name):
                check_writable(getattr(options, name), f"--{name}")
        code = work(options)
        sys.stdout.flush()  # a reader who has gone away is noticed here, not at exit
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        folder = getattr(options, "folder", None) if resumes else None
        kept = f"what is finished is kept in {folder}, and the same command goes on from there"
        print(f"{parser.prog}: stopped; {kept if folder else 'nothing is kept'}", file=sys.stderr, flush=True)
        return 130
    except EXPECTED as error:
        parser.error(one_line(error))
    return code or 0


# ---- what an option may be -------------------------------------------------------------------

FIGURES = (".png", ".svg")
MOST = 2**31 - 1
"""Of anything that is counted."""


def check_count(option: str, value: Any) -> None:
    """Raise ValueError unless this is a positive integer of a size that anything may have."""
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"{option} is {value}, expected a positive integer")
    if value > MOST:
        raise ValueError(f"{option} is {value}, expected at most {MOST}")


def _seed(option: str, value: Any) -> None:
    if not 0 <= value <= 2**63:
        raise ValueError(f"{option} is {value}, expected an integer from 0 to 2**63")


def _positive(option: str, value: Any) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{option} is {value}, expected a positive number")


def _share(option: str, value: Any) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{option} is {value}, expected a number in (0, 1]")


def _below_one(option: str, value: Any) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{option} is {value}, expected a number in [0, 1)")


def _figure(option: str, value: Any) -> None:
    if os.path.splitext(value)[1] not in FIGURES:
        raise ValueError(f"{option} is {value!r}, expected the name of a {' or '.join(FIGURES)} file")


def _address(option: str, value: Any) -> None:
    if not re.fullmatch(r"[a-z]+://[^\s/:]+:[0-9]{1,5}/?", value):
        raise ValueError(f"{option} is {value!r}, expected the address of a scheduler, like tcp://host:8786")


CHECKS: dict[str, Callable[[str, Any], None]] = {
    **dict.fromkeys(
        ("batch", "basis_batches", "basis_samples", "calibration_batches", "epochs", "eval_batch", "image_size", "jobs",
         "lora_rank", "memory", "micro_batch", "num_classes", "patch", "repeats", "seeds", "segments",
         "steps", "test_images", "train_images", "trials", "tuning_epochs"),
        check_count,
    ),
    **dict.fromkeys(("lr", "lr_grid", "clip", "budget_kib"), _positive),
    **dict.fromkeys(("epsilon", "ratio", "share", "threshold"), _share),
    **dict.fromkeys(("momentum", "threshold_step"), _below_one),
    "seed": _seed,
    "figure": _figure,
    "plot": _figure,
    "scheduler": _address,
}  # fmt: skip
"""What the options of all commands may be, by name: one option means one thing everywhere."""


def check_options(options: argparse.Namespace) -> None:
    """Check every option that was given, before anything is looked up or run.

    Raises
    ------
    ValueError
        For the first that is out of range, with its name, its value and what was expected.
    """
    for name, value in vars(options).items():
        check = CHECKS.get(name)
        if check is None or value is None:
            continue
        for each in value if isinstance(value, list) else [value]:
            check(f"--{name.replace('_', '-')}", each)


def check_names(options: argparse.Namespace) -> None:
    """Check ``--net``, ``--data`` and ``--tune`` of a command that trains a built-in network.

    Raises
    ------
    ValueError
        If there is no such network, no such data set or folder, or the selection fits no layer of the network.
    """
    from lance_ref import datasets, models
    from lance_ref.nn.init import shapes_only
    from lance_ref.nn.selection import choose

    net = models.find(options.net)
    for name in ("data", "calibrate_on"):
        value = getattr(options, name, None)
        if value is not None and value not in (*datasets.names(), "negatives") and not os.path.isdir(value):
            known = ", ".join(datasets.names())
            raise ValueError(f"--{name.replace('_', '-')} is {value!r}, expected a folder of images or one of {known}")
    with shapes_only():
        choose(net.make(num_classes=2), options.tune)


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
