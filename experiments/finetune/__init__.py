"""Fine-tuning under every method: accuracy against bytes."""

from experiments.finetune.command import main, parser

__all__ = ["main", "parser"]
