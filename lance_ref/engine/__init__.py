"""Tensors, the tape and its counters: what every operation is built on."""
