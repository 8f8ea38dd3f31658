"""PyTorch's functions by their names: values and gradients in float64, with unusual arguments."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from torch.nn import functional as TF  # noqa: E402
from torch_twins import one_thread  # noqa: E402

from lance_ref import functional as F  # noqa: E402
from lance_ref.convert.functions import FUNCTIONS  # noqa: E402
from lance_ref.engine.tensor import Tensor  # noqa: E402

Case = tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]]


def x(*shape: int) -> Any:
    """Floating numbers."""
    return torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(len(shape))) - 0.3


MASK = torch.tensor([[True, False, True, True], [True, True, False, True], [True, True, True, True]])
CASES: list[Case] = [
    ("tensor_split", torch.tensor_split, (x(7, 3), 3), {}),
    ("tensor_split", torch.tensor_split, (x(4, 7),), {"indices": (2, 5), "dim": 1}),
    ("repeat", torch.Tensor.repeat, (x(2, 3), 2, 1, 2), {}),
    ("repeat_interleave", torch.repeat_interleave, (x(2, 3, 4), 3, -2), {}),
    ("roll", torch.roll, (x(3, 5), (2, -1), (1, 0)), {}),
    ("unflatten", torch.unflatten, (x(2, 6), -1, (2, 3)), {}),
    ("clamp", torch.clamp, (x(4, 3), -0.1), {}),
    ("clamp", torch.clamp, (x(4, 3),), {"max": 0.2}),
    ("hardtanh", TF.hardtanh, (x(4, 3), -0.1, 0.3), {}),
    ("addmm", torch.addmm, (x(4), x(3, 5), x(5, 4)), {}),
    ("addmm", torch.addmm, (x(3, 4), x(3, 5), x(5, 4)), {"beta": 2, "alpha": 0.5}),
    ("baddbmm", torch.baddbmm, (x(2, 3, 4), x(2, 3, 5), x(2, 5, 4)), {"alpha": 3}),
    ("addcmul", torch.addcmul, (x(3, 4), x(3, 4), x(4)), {"value": 2}),
    ("einsum", torch.einsum, ("bhqd,bhkd->bhqk", x(2, 3, 4, 5), x(2, 3, 6, 5)), {}),
    ("einsum", torch.einsum, ("abc,cd->dab", x(2, 3, 4), x(4, 5)), {}),
    ("where", torch.where, (MASK, x(3, 4), x(4)), {}),
    ("masked_fill", torch.masked_fill, (x(3, 4), MASK, -2.0), {}),
    ("cat", torch.cat, ([torch.zeros(0, dtype=torch.float64), x(2, 3), x(2, 3)], -1), {}),
    ("getitem", lambda t, i: t[i], (x(4, 5), (slice(1, 4, 2), [0, 4])), {}),
    ("normalize", TF.normalize, (x(3, 4),), {"dim": 0}),
    ("norm", torch.norm, (x(3, 4), 2, 1, True), {}),
    ("_weight_norm", torch._weight_norm, (x(3, 4), x(3, 1), 0), {}),
    ("layer_norm", TF.layer_norm, (x(3, 4), (4,), x(4), None, 1e-3), {}),
    ("instance_norm", TF.instance_norm, (x(2, 3, 5),), {"weight": x(3), "bias": x(3)}),
    ("avg_pool3d", TF.avg_pool3d, (x(1, 2, 4, 5, 6), 2, 2, 1), {"count_include_pad": False}),
    ("adaptive_avg_pool1d", TF.adaptive_avg_pool1d, (x(2, 3, 7), 3), {}),
    ("adaptive_avg_pool3d", TF.adaptive_avg_pool3d, (x(2, 3, 4, 5, 6), 1), {}),
    ("interpolate", TF.interpolate, (x(1, 2, 4, 5),), {"size": (7, 3), "mode": "bilinear", "align_corners": True}),
    ("conv1d", TF.conv1d, (x(2, 4, 9), x(6, 2, 3), x(6), 2, 1, 1, 2), {}),
    ("scaled_dot_product_attention", TF.scaled_dot_product_attention, (x(2, 3, 5), x(2, 4, 5), x(2, 4, 6), MASK), {}),
    ("scaled_dot_product_attention", TF.scaled_dot_product_attention, (x(2, 4, 5), x(2, 4, 5), x(2, 4, 5)),
     {"is_causal": True, "scale": 0.7}),
    ("scaled_dot_product_attention", TF.scaled_dot_product_attention, (x(1, 4, 3, 5), x(1, 2, 3, 5), x(1, 2, 3, 5)),
     {"enable_gqa": True}),
]  # fmt: skip


def leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, (torch.Tensor, Tensor)):
        yield value
    elif isinstance(value, (tuple, list)):
        for each in value:
            yield from leaves(each)


def ours(value: Any) -> Any:
    """The same arguments with tensors of ours, floating ones with gradients."""
    if isinstance(value, torch.Tensor):
        return Tensor(value.detach().numpy().copy(), requires_grad=value.is_floating_point())
    if isinstance(value, (tuple, list)):
        return type(value)(ours(each) for each in value)
    return value


@pytest.mark.parametrize("case", CASES, ids=[f"{number}-{case[0]}" for number, case in enumerate(CASES)])
def test_values_and_gradients_are_pytorchs(case: Case) -> None:
    """An argument that is dropped, or taken for another one, would be seen."""
    name, function, args, kwargs = case
    theirs = [tensor for tensor in leaves((args, tuple(kwargs.values()))) if tensor.is_floating_point()]
    for tensor in theirs:
        tensor.requires_grad_()
    with one_thread():
        expected = list(leaves(function(*args, **kwargs)))
        sum((each * each).sum() for each in expected).backward()
    own_args, own_kwargs = ours(args), {key: ours(value) for key, value in kwargs.items()}
    found = list(leaves(FUNCTIONS[name](*own_args, **own_kwargs)))
    assert len(found) == len(expected)
    for mine, each in zip(found, expected, strict=True):
        np.testing.assert_allclose(mine.data, each.detach().numpy(), rtol=1e-10, atol=1e-12)
    total = F.sum(F.mul(found[0], found[0]))
    for each in found[1:]:
        total = total + F.sum(F.mul(each, each))
    total.backward()
    own = [tensor for tensor in leaves((own_args, tuple(own_kwargs.values()))) if tensor.requires_grad]
    for mine, tensor in zip(own, theirs, strict=True):
        if tensor.grad is not None and tensor.numel():
            np.testing.assert_allclose(mine.grad, tensor.grad.numpy(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("separate", "mask"), [(False, False), (True, False), (False, True)])
def test_attention_of_several_heads(separate: bool, mask: bool) -> None:
    """One projection for all, or three of different widths; a mask of numbers."""
    torch.manual_seed(0)
    layer = torch.nn.MultiheadAttention(6, 2, kdim=5 if separate else None, vdim=4 if separate else None).double()
    query = x(3, 2, 6)
    key, value = (x(4, 2, 5), x(4, 2, 4)) if separate else (query, query)
    given = torch.zeros(3, key.shape[0], dtype=torch.float64)
    given[0, 1] = -1.5
    with one_thread(), torch.no_grad():
        expected, _ = layer(query, key, value, attn_mask=given if mask else None, need_weights=False)
    weights = {name: Tensor(p.detach().numpy()) for name, p in layer.named_parameters()}
    q = Tensor(query.numpy())
    k, v = (Tensor(key.numpy()), Tensor(value.numpy())) if separate else (q, q)
    found, _ = FUNCTIONS["multi_head_attention_forward"](
        q, k, v, 6, 2, weights.get("in_proj_weight"), weights["in_proj_bias"], None, None, False, 0.0,
        weights["out_proj.weight"], weights["out_proj.bias"], attn_mask=Tensor(given.numpy()) if mask else None,
        use_separate_proj_weight=separate, q_proj_weight=weights.get("q_proj_weight"),
        k_proj_weight=weights.get("k_proj_weight"), v_proj_weight=weights.get("v_proj_weight"),
    )  # fmt: skip
    np.testing.assert_allclose(found.data, expected.numpy(), rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "args", "kwargs", "words"),
    [
        ("norm", (x(3, 4), 1), {}, "p is 1, expected 2"),
        ("einsum", ("ii->i", x(3, 3)), {}, "expected two operands"),
        ("einsum", ("ab,bc->ac", x(3, 3)), {}, "expected two operands"),
        ("einsum", ("ab,cb->a", x(2, 3), x(4, 3)), {}, "letters that stand once in each"),
        ("roll", (x(3, 3), 1), {}, "roll has no dims"),
        ("repeat_interleave", (x(3, 3), 2), {}, "a dimension"),
        ("max_pool2d", (x(1, 2, 4, 4), 2), {"dilation": 2}, "max_pool2d has a dilation"),
        ("max_pool3d", (x(1, 2, 4, 4, 4), 2), {"return_indices": True}, "returns indices"),
        ("avg_pool2d", (x(1, 2, 4, 4), 2), {"divisor_override": 3}, "divisor_override is 3, expected None"),
        ("adaptive_avg_pool3d", (x(1, 2, 4, 4, 4), 2), {}, "expected (1, 1, 1)"),
        ("interpolate", (x(1, 2, 4, 4), 2), {"antialias": True}, "antialias is True"),
        ("instance_norm", (x(2, 3, 5),), {"use_input_stats": False}, "use_input_stats is False"),
        ("embedding", (torch.tensor([1]), x(3, 4)), {"max_norm": 1.0}, "max_norm is 1.0"),
        ("mse_loss", (x(3), x(3)), {"size_average": True}, "size_average is True"),
        ("cross_entropy", (x(2, 3, 4), torch.zeros(2, 4, dtype=torch.int64)), {}, "expected (B, K) with integers"),
        ("cross_entropy", (x(2, 3), torch.zeros(2, dtype=torch.int64)), {"label_smoothing": 0.1}, "label_smoothing"),
        ("lstm", (x(2, 3, 4), (x(1, 3, 5),), [x(20, 4)], True), {}, "packed"),
    ],
)  # fmt: skip
def test_what_has_no_counterpart_is_refused(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], words: str
) -> None:
    """Not computed as something else."""
    with pytest.raises(ValueError, match=re.escape(words)):
        FUNCTIONS[name](*ours(args), **kwargs)
