"""What a training step in a fixed RAM is worth: accuracy against all the memory that the step needs."""

from experiments.device.command import main, parser

__all__ = ["main", "parser"]
