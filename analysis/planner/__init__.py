"""What fits a device: candidates, their memory, their fidelity, the search."""
