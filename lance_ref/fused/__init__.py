"""Forward passes without gradients, a few images at a time: operations joined into groups that stay in the cache."""
