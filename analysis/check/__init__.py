"""The grid of nets, methods, batch sizes and dtypes: cells and table."""
