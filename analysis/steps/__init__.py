"""The traced training step, and what each method makes of it."""
