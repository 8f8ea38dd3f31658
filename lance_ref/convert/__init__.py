"""Networks of PyTorch as networks of this library: layers, weights, and the order in which they run."""
