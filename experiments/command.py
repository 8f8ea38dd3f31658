"""The commands under one name: ``lance-ref cost --net mobilenetv2`` is ``python -m analysis.cost_model --net ...``.

Other than ``python -m``, a program of this kind does not look for modules in the working directory first.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

from analysis.commands import command_line
from analysis.commands.command_line import OneLineParser, run_main

GROUPS = {
    "What a training step costs; nothing is trained, and it takes seconds:": {
        "cost": ("analysis.cost_model", "bytes and multiply-adds of one step, method by method"),
        "plan": ("analysis.plan", "which methods fit into the RAM of a device"),
        "device": ("analysis.device.command", "one step as a program for a small device"),
        "spectra": ("analysis.spectra", "measure a net on images, for better ranks in the three above"),
    },
    "Training, on your own net and images or on those that are here:": {
        "finetune": ("experiments.finetune.command", "fine-tune a net with every method, and compare"),
        "finetune-sweep": ("experiments.finetune.sweep", "the same with many settings of the methods"),
        "device-accuracy": ("experiments.device.command", "accuracy against all RAM of a small device"),
        "continual": ("experiments.continual.command", "learn tasks one after the other"),
        "adapt": ("experiments.adapt", "MobileNetV2 with LANCE on another data set, step by step"),
        "domain-shift": ("experiments.domain_shift", "calibrate on other images than those to learn"),
        "descent": ("experiments.descent.command", "does the compressed gradient point downhill?"),
    },
    "The papers, and whether the numbers are right:": {
        "claims": ("experiments.ledger.claims", "what came of every claim of the papers"),
        "explain": ("experiments.ledger.explain", "why a published cost differs from ours"),
        "validate": ("analysis.validate", "every prediction beside a measurement"),
        "corpus": ("experiments.corpus.command", "which networks of PyTorch are predicted, how exactly"),
        "conformance": ("lance_ref.conformance.__main__", "check an implementation of yours"),
        "weights": ("experiments.weights", "pretrained weights from the published originals"),
    },
}
"""Name, module and meaning of every command, by what one wants to know."""
COMMANDS = {name: of for group in GROUPS.values() for name, of in group.items()}
HELP = """Begin with:

  lance-ref cost --net mobilenetv2
  lance-ref finetune --quick

lance-ref COMMAND --help says what a command does and lists its options.
The shell completes commands, options and names after
  eval "$(register-python-argcomplete lance-ref)"
"""


def usage() -> str:
    """What ``lance-ref --help`` prints."""
    size = max(map(len, COMMANDS))
    parts = ["usage: lance-ref COMMAND [OPTIONS]"]
    for title, group in GROUPS.items():
        parts.append("\n".join([title, *(f"  {name:<{size}}  {about}" for name, (_, about) in group.items())]))
    return "\n\n".join([*parts, HELP])


def complete() -> None:
    """Answer the shell that asks for what may come next on the line; it ends the process then.

    For ``lance-ref cost --ne`` the parser of ``cost`` is asked, and sees its own name and options alone.
    """
    import argcomplete

    line, point = os.environ["COMP_LINE"], int(os.environ["COMP_POINT"])
    program, _, rest = line.partition(" ")
    command, space, _ = rest.lstrip().partition(" ")
    if command not in COMMANDS or not space:
        parser = argparse.ArgumentParser(prog="lance-ref")
        parser.add_argument("command", choices=list(COMMANDS))
        argcomplete.autocomplete(parser)
        return
    parser = import_module(COMMANDS[command][0]).parser()
    for action in parser._actions:
        names = NAMES.get(action.dest)
        if names is not None:
            action.completer = names
    cut = line.index(command, len(program))
    os.environ |= {"COMP_LINE": line[cut:], "COMP_POINT": str(point - len(line[:cut].encode()))}
    argcomplete.autocomplete(parser)


def _nets(**_: Any) -> list[str]:
    from lance_ref import models

    return list(models.names())


def _methods(**_: Any) -> list[str]:
    from analysis.steps.methods import METHODS

    return [*METHODS, "all"]


NAMES = {"net": _nets, "nets": _nets, "method": _methods, "methods": _methods}
"""What may follow these options, for the shell."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    if "_ARGCOMPLETE" in os.environ:
        complete()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] in (["--help"], ["-h"]):
        sys.stdout.write(usage())
        return 0
    if not given or given[0] not in COMMANDS:
        came = f"unknown command {given[0]!r}" if given else "no command"
        OneLineParser(prog="lance-ref").error(f"{came}, expected one of {', '.join(COMMANDS)}, or --help")
    before, command_line.program = command_line.program, f"lance-ref {given[0]}"
    try:
        return run_main(lambda: import_module(COMMANDS[given[0]][0]).main(given[1:]))
    finally:
        command_line.program = before


if __name__ == "__main__":
    sys.exit(main())
