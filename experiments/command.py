"""The commands under one name: ``lance-ref cost --net mobilenetv2`` is ``python -m analysis.cost_model --net ...``.

Other than ``python -m``, a program of this kind does not look for modules in the working directory first.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from analysis.commands.cli import OneLineParser, run_main

COMMANDS = {
    "cost": ("analysis.cost_model", "what one training step keeps in memory and computes"),
    "plan": ("analysis.plan", "which methods fit a device"),
    "spectra": ("analysis.spectra", "measure the spectra of a net's activations, from which ranks are chosen"),
    "explain": ("experiments.ledger.explain", "why a published cost differs from ours"),
    "claims": ("experiments.ledger.claims", "what came of everything that the papers claim"),
    "validate": ("analysis.validate", "predict and run every method on every net, and compare"),
    "finetune": ("experiments.finetune.command", "fine-tune with every method"),
    "finetune-sweep": ("experiments.finetune.sweep", "accuracy over bytes: every method with several settings"),
    "adapt": ("experiments.adapt", "fine-tune MobileNetV2 on another data set"),
    "continual": ("experiments.continual.command", "learn tasks one after the other"),
    "descent": ("experiments.descent.command", "whether the compressed gradient is a direction of descent"),
    "domain-shift": ("experiments.domain_shift", "calibrate on other images than those to learn"),
    "conformance": ("lance_ref.conformance.__main__", "check an implementation of yours against the definitions"),
}
"""Name, module and meaning of every command."""


def usage() -> str:
    """What ``lance-ref --help`` prints."""
    size = max(map(len, COMMANDS))
    listed = "\n".join(f"  {name:<{size}}  {about}" for name, (_, about) in COMMANDS.items())
    return f"usage: lance-ref COMMAND ...\n\n{listed}\n\nlance-ref COMMAND --help lists the options of a command.\n"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
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
