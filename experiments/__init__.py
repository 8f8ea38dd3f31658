"""Experiments whose results are committed: fine-tuning, continual learning, descent, domains, and the ledger of claims."""
