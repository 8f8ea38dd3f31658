"""Fine-tuning under every method: accuracy against bytes."""
