"""Experiments whose results are committed, and the ledger of published claims that they answer."""

from analysis.commands import stopping  # noqa: F401  (first: Ctrl-C while a command imports what it needs)
