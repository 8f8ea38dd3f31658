"""``python -m experiments.continual``."""

import sys

from experiments.continual.command import main

if __name__ == "__main__":
    sys.exit(main())
