"""Sequences of tasks: accuracy, forgetting and memory of every learner."""

from experiments.continual.command import main, parser

__all__ = ["main", "parser"]
