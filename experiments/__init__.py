"""Experiments whose results are committed, and the ledger of published claims that they answer."""
