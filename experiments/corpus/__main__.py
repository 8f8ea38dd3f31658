"""``python -m experiments.corpus``."""

import sys

from analysis.commands.cli import run_main
from experiments.corpus.command import main

if __name__ == "__main__":
    sys.exit(run_main(main))
