"""Attention of tokens to one another."""

from __future__ import annotations

import math

from lance_ref import functional as F
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.layers import Linear, Rng, positive_integers
from lance_ref.nn.module import Module


class SelfAttention(Module):
    """Multi-head self-attention: softmax(Q Kᵀ / √D) V in each head, the heads joined and mixed.

    Vaswani et al. (NeurIPS 2017, arXiv 1706.03762), equation 1 and section 3.2.2, with the three projections in one
    matrix, as vision transformers have it. For backward the two products keep Q, K and V, which share one (B, N, 3·C)
    array, and the (B, num_heads, N, N) attention, which the softmax keeps too.

    Parameters
    ----------
    dim : int
        Features C of a token.
    num_heads : int
        Heads of D = C / num_heads features each; a divisor of ``dim``.
    bias : bool
        Of both linear layers: ``qkv`` from C to 3·C (all queries, then keys, then values), and ``proj`` on the joined
        heads.
    """

    def __init__(self, dim: int, num_heads: int, bias: bool = True, rng: Rng = None) -> None:
        super().__init__()
        self.dim, self.num_heads = positive_integers("SelfAttention", dim=dim, num_heads=num_heads)
        if dim % num_heads:
            raise ValueError(f"SelfAttention: num_heads is {num_heads}, expected a divisor of dim = {dim}")
        self.qkv = Linear(dim, 3 * dim, bias, rng)
        self.proj = Linear(dim, dim, bias, rng)

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 3 or x.shape[2] != self.dim:
            raise ValueError(f"SelfAttention: x has shape {x.shape}, expected (B, N, {self.dim})")
        B, N, C = x.shape
        H, D = self.num_heads, C // self.num_heads
        qkv = self.qkv(x).reshape(B, N, 3, H, D).permute(2, 0, 3, 1, 4)  # (3, B, H, N, D)
        q, k, v = qkv[0], qkv[1], qkv[2]
        # scores and their softmax, (B, H, N, N), without names: each is given back as soon as it has been used
        mixed = F.softmax((q @ k.transpose(-2, -1)) * (1 / math.sqrt(D)), dim=-1) @ v  # (B, H, N, D)
        return self.proj(mixed.permute(0, 2, 1, 3).reshape(B, N, C))

    def extra_repr(self) -> str:
        return f"{self.dim}, num_heads={self.num_heads}"
