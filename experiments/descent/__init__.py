"""Is the compressed gradient a descent direction?"""

from experiments.descent.command import main, parser

__all__ = ["main", "parser"]
