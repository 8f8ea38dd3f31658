"""``python -m experiments.descent``."""

import sys

from experiments.descent.command import main

if __name__ == "__main__":
    sys.exit(main())
