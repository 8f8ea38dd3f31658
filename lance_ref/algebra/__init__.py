"""Tensor algebra: unfoldings, mode products, HOSVD, subspaces, and the projection of a weight gradient."""
