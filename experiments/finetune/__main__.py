"""``python -m experiments.finetune``."""

import sys

from analysis.commands.command_line import run_main
from experiments.finetune.command import main

if __name__ == "__main__":
    sys.exit(run_main(main))
