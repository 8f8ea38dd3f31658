"""``python -m experiments.finetune``."""

import sys

from experiments.finetune.command import main

if __name__ == "__main__":
    sys.exit(main())
