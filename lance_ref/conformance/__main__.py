"""``python -m lance_ref.conformance --write DIR`` and ``--check pkg.module:adapter [DIR]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from lance_ref.conformance.checking import FAILED, PASSED, check, load_adapter, misspelt
from lance_ref.conformance.files import load_kit, make_kit, write_kit
from lance_ref.conformance.table import render
from lance_ref.io import stopping as _stopping


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = _Parser(
        prog="python -m lance_ref.conformance",
        usage="%(prog)s --write DIR | --check ADAPTER [DIR]",
        description="Small cases of LANCE's arithmetic, and a check of any implementation against them.",
        epilog="Exit code: 0 all passed, 1 some failed or none ran, 2 wrong usage. docs/conformance.md specifies "
        "the files and the functions of an adapter.",
    )
    what = result.add_mutually_exclusive_group(required=True)
    what.add_argument("--write", metavar="DIR", help="write the cases as .npz files and cases.json")
    what.add_argument(
        "--check", metavar="PKG.MODULE:ADAPTER", help="run an adapter over the cases and print a table of what passes"
    )
    result.add_argument(
        "directory", metavar="DIR", nargs="?", help="with --check: a folder that --write made (default: the same cases)"
    )
    result.add_argument(
        "--only", metavar="GLOB", help="with --check: only these, as case/function: 'conv_*', '*/weight_gradient'"
    )
    result.add_argument("--verbose", action="store_true", help="with --check: a line for each check")
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; 0 if all checks passed, 1 if not, SystemExit(2) with one line for wrong usage."""
    command = parser()
    options = command.parse_args(arguments)
    if options.write is not None and (options.directory is not None or options.only is not None or options.verbose):
        command.error("--write takes one folder and no other options")
    try:
        if options.write is not None:
            kit = write_kit(options.write)
            checks = sum(len(case.checks) for case in kit.cases)
            print(f"wrote {len(kit.cases)} cases with {checks} checks to {options.write}")
            return 0
        adapter = load_adapter(options.check)
        kit = make_kit() if options.directory is None else load_kit(options.directory)
        outcomes = check(adapter, kit, "*" if options.only is None else options.only)
        if not outcomes:
            command.error(f"--only is {options.only!r}, which no case matches; expected a glob over case/function")
    except (ValueError, TypeError, OSError) as error:
        command.error(str(error))
    notes = [f"note: {hint}\n" for hint in misspelt(adapter)]
    _say("".join([render(outcomes, kit.tolerances, options.verbose), *notes]))
    statuses = {one.status for one in outcomes}
    return 1 if FAILED in statuses or PASSED not in statuses else 0


def _say(text: str) -> None:
    """Write to stdout whatever its encoding: reasons quote what adapters say."""
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(text.encode(encoding, "backslashreplace").decode(encoding))


if __name__ == "__main__":
    sys.exit(_stopping.run(main))
