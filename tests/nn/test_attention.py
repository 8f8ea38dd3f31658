"""Self-attention against PyTorch's, against loops, and by the symmetry that it must have."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from helpers import check_vjp
from hypothesis import given
from hypothesis import strategies as st

from lance_ref import Tensor, nn, tape
from lance_ref import functional as F


def by_loops(net: nn.SelfAttention, x: np.ndarray) -> np.ndarray:
    """The definition, one head of one sequence at a time."""
    B, _, C = x.shape
    D = C // net.num_heads
    q, k, v = np.split(x @ net.qkv.weight.data.T + net.qkv.bias.data, 3, axis=-1)
    out = np.zeros_like(x)
    for b in range(B):
        for head in range(net.num_heads):
            own = slice(head * D, (head + 1) * D)
            scores = np.exp(q[b, :, own] @ k[b, :, own].T / math.sqrt(D))
            out[b, :, own] = scores / scores.sum(axis=1, keepdims=True) @ v[b, :, own]
    return out @ net.proj.weight.data.T + net.proj.bias.data


def make(dim: int, heads: int) -> nn.SelfAttention:
    return nn.SelfAttention(dim, heads, rng=0).to(np.float64)


@given(B=st.integers(1, 3), N=st.integers(1, 5), D=st.integers(1, 4), heads=st.integers(1, 3))
def test_equals_the_definition(B: int, N: int, D: int, heads: int) -> None:
    """Heads, queries, keys or values cut elsewhere, or another scale, for any sizes."""
    net = make(heads * D, heads)
    x = np.random.default_rng(1).normal(size=(B, N, heads * D))
    np.testing.assert_allclose(net(x).data, by_loops(net, x), rtol=1e-10, atol=1e-12)


def test_a_wrong_scale_is_caught() -> None:
    """Planted: 1/D in place of 1/√D; the definition above must notice."""
    net = make(6, 2)
    x = np.random.default_rng(1).normal(size=(2, 4, 6))
    wrong = make(6, 2)
    wrong.qkv.weight.data[:6] /= math.sqrt(3)
    wrong.qkv.bias.data[:6] /= math.sqrt(3)
    assert np.abs(wrong(x).data - by_loops(net, x)).max() > 1e-3


def test_gradients_equal_differences() -> None:
    """For the input and both weights, every entry."""
    net = make(4, 2)
    rng = np.random.default_rng(2)

    def run(x: Tensor, qkv: Tensor, proj: Tensor) -> Tensor:
        net.qkv.forward = lambda x: F.linear(x, qkv, net.qkv.bias)
        net.proj.forward = lambda x: F.linear(x, proj, net.proj.bias)
        return net(x)

    check_vjp(run, rng.normal(size=(2, 3, 4)), rng.normal(size=(12, 4)), rng.normal(size=(4, 4)))


def test_equals_pytorchs_multihead_attention() -> None:
    """An implementation from elsewhere, values and gradients; its in_proj is our qkv."""
    torch = pytest.importorskip("torch")
    net, theirs = make(12, 3), torch.nn.MultiheadAttention(12, 3, batch_first=True).double()
    names = {"in_proj_weight": net.qkv.weight, "in_proj_bias": net.qkv.bias}
    names |= {"out_proj.weight": net.proj.weight, "out_proj.bias": net.proj.bias}
    theirs.load_state_dict({name: torch.from_numpy(p.data.copy()) for name, p in names.items()})
    rng = np.random.default_rng(3)
    x, g = rng.normal(size=(2, 2, 5, 12))
    ours, tensor = Tensor(x, requires_grad=True), torch.tensor(x, requires_grad=True)
    out, (expected, _) = net(ours), theirs(tensor, tensor, tensor, need_weights=False)
    out.backward(g)
    expected.backward(torch.tensor(g))
    pairs: list[tuple[Any, Any]] = [(out.data, expected.detach()), (ours.grad, tensor.grad)]
    pairs += [(p.grad, dict(theirs.named_parameters())[name].grad) for name, p in names.items()]
    for got, wanted in pairs:
        np.testing.assert_allclose(got, wanted.numpy(), rtol=1e-8, atol=1e-12)


@given(seed=st.integers(0, 100))
def test_tokens_in_another_order_give_the_same_in_that_order(seed: int) -> None:
    """Attention knows no positions; a reshape that mixed tokens with heads would."""
    net = make(6, 2)
    rng = np.random.default_rng(seed)
    x, order = rng.normal(size=(2, 5, 6)), rng.permutation(5)
    np.testing.assert_allclose(net(x[:, order]).data, net(x).data[:, order], rtol=1e-10, atol=1e-12)


def test_what_it_keeps() -> None:
    """x, Q K V in one array, the attention once, the mixed heads, and the number 1/√D; 4 bytes each."""
    B, N, C, H = 2, 5, 12, 3
    net = nn.SelfAttention(C, H, rng=0)
    x = Tensor(np.ones((B, N, C), np.float32), requires_grad=True)
    kept = B * N * C + B * N * 3 * C + B * H * N * N + B * N * C + 1
    assert tape(net(x)).total_bytes == 4 * kept
    assert net(np.ones((B, N, C), np.float32)).dtype == np.float32


def test_bad_arguments_are_named() -> None:
    """Heads that do not divide the features, or an input that is no sequence of tokens."""
    with pytest.raises(ValueError, match="num_heads is 5, expected a divisor of dim = 12"):
        nn.SelfAttention(12, 5)
    with pytest.raises(ValueError, match="SelfAttention: num_heads is 0"):
        nn.SelfAttention(12, 0)
    for shape in ((2, 12), (2, 5, 11)):
        with pytest.raises(ValueError, match=r"x has shape .* expected \(B, N, 12\)"):
            nn.SelfAttention(12, 3, rng=0)(np.zeros(shape, np.float32))
    assert nn.SelfAttention(4, 2, bias=False, rng=0).proj.bias is None
    assert "num_heads=2" in repr(nn.SelfAttention(4, 2, rng=0))
