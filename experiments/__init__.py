"""Experiments whose results are committed, and the ledger of published claims that they answer."""

from analysis.commands import shipped  # noqa: F401  isort: skip  (before anything else is looked for)
from analysis.commands import stopping  # noqa: F401  isort: skip  (then: Ctrl-C while a command imports what it needs)
