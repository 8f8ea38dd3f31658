"""Ranks of the tuned layers: from spectra, at any batch size."""
