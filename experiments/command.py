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

from analysis.commands.cli import OneLineParser, run_main

COMMANDS = {
    "cost": ("analysis.cost_model", "what one training step keeps in memory and computes"),
    "plan": ("analysis.plan", "which methods fit a device"),
    "device": ("analysis.device.command", "a training step compiled for a device: every byte and multiply-add"),
    "spectra": ("analysis.spectra", "measure the spectra of a net's activations, from which ranks are chosen"),
    "explain": ("experiments.ledger.explain", "why a published cost differs from ours"),
    "claims": ("experiments.ledger.claims", "what came of everything that the papers claim"),
    "validate": ("analysis.validate", "predict and run every method on every net, and compare"),
    "finetune": ("experiments.finetune.command", "fine-tune with every method"),
    "finetune-sweep": ("experiments.finetune.sweep", "accuracy over bytes: every method with several settings"),
    "device-accuracy": ("experiments.device.command", "accuracy over all RAM of a training step on a small device"),
    "corpus": ("experiments.corpus.command", "which networks of PyTorch are predicted, and how exactly"),
    "weights": ("experiments.weights", "make the files of pretrained weights from the published originals"),
    "adapt": ("experiments.adapt", "fine-tune MobileNetV2 on another data set"),
    "continual": ("experiments.continual.command", "learn tasks one after the other"),
    "descent": ("experiments.descent.command", "whether the compressed gradient is a direction of descent"),
    "domain-shift": ("experiments.domain_shift", "calibrate on other images than those to learn"),
    "conformance": ("lance_ref.conformance.__main__", "check an implementation of yours against the definitions"),
}
"""Name, module and meaning of every command."""
HELP = "lance-ref COMMAND --help lists the options of a command."
COMPLETION = 'eval "$(register-python-argcomplete lance-ref)" lets the shell complete commands, options and names.'


def usage() -> str:
    """What ``lance-ref --help`` prints."""
    size = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{size}}  {about}" for name, (_, about) in COMMANDS.items())
    return f"usage: lance-ref COMMAND ...\n\n{listed}\n\n{HELP}\n{COMPLETION}\n"


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
    return run_main(lambda: import_module(COMMANDS[given[0]][0]).main(given[1:]))


if __name__ == "__main__":
    sys.exit(main())
