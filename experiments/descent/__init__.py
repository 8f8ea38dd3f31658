"""Is the compressed gradient a descent direction?"""
