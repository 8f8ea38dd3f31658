"""``python -m analysis.device``: see :mod:`analysis.device.command`."""

from __future__ import annotations

import sys

from analysis.commands.command_line import run_main
from analysis.device.command import main

if __name__ == "__main__":
    sys.exit(run_main(main))
