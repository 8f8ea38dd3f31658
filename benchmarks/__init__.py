"""Side-by-side timings: ours, and a peer's, in one run."""

from analysis.commands import stopping  # noqa: F401  (first: Ctrl-C while a benchmark imports what it needs)
