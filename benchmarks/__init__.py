"""Side-by-side timings: ours, and a peer's, in one run."""
