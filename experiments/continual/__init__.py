"""Sequences of tasks: accuracy, forgetting and memory of every learner."""
