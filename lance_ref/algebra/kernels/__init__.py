"""Loops that NumPy cannot run well, compiled by Numba, each beside the NumPy it must equal."""
