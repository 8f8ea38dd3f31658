"""Operations on shapes alone by the short way: results lie as those of the real kernels do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from analysis.torch_modules.shortcuts import COMPILED, LIKE, shortcut  # noqa: E402

ATEN = torch.ops.aten
END = 2**63 - 1  # as autograd says "up to the end"
LOOKS: dict[str, Callable[[Any], Any]] = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(1, 2),
    "a part": lambda x: x[:, 1:, ::2],
    "channels last": lambda x: x.contiguous(memory_format=torch.channels_last),
}


def cases(x: Any) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """An operation of every name that has a short way, by its overload, for one input (B, C, H, W)."""
    channels, last = x.shape[1], x.shape[-1]
    weight, bias, mean = (torch.ones(channels) for _ in range(3))
    row, rows = torch.ones(last), torch.ones(*x.shape[:-1], 1)
    matrix, batches = x.reshape(-1, last), x.reshape(x.shape[0], -1, last)
    square = torch.ones(last, 5)
    norm = (x, weight, bias, mean.clone(), mean.clone(), True, 0.1, 1e-5)
    return {
        "view": (ATEN.view.default, (x.contiguous(), [x.shape[0], -1])),
        "_unsafe_view": (ATEN._unsafe_view.default, (x.contiguous(), [-1, last])),
        "t": (ATEN.t.default, (matrix,)),
        "transpose": (ATEN.transpose.int, (x, 1, 3)),
        "permute": (ATEN.permute.default, (x, [0, 2, 3, 1])),
        "slice": (ATEN.slice.Tensor, (x, 2, 1, END, 2)),
        "select": (ATEN.select.int, (x, 1, 1)),
        "unsqueeze": (ATEN.unsqueeze.default, (x, 2)),
        "squeeze": (ATEN.squeeze.dim, (x[:, :1], 1)),
        "expand": (ATEN.expand.default, (x[:, :1], [-1, 4, -1, -1])),
        "detach": (ATEN.detach.default, (x,)),
        "slice_backward": (ATEN.slice_backward.default, (x, [*x.shape[:2], 2 * x.shape[2] - 1, last], 2, 0, END, 2)),
        "cat": (ATEN.cat.default, ([x, x], 1)),
        "clone": (ATEN.clone.default, (x,)),
        "add": (ATEN.add.Tensor, (x, x)),
        "sub": (ATEN.sub.Tensor, (x, row)),
        "mul": (ATEN.mul.Tensor, (x, x[:, :1])),
        "div": (ATEN.div.Tensor, (x, 2.0)),
        "sum": (ATEN.sum.dim_IntList, (x, [0, 2], True)),
        "mm": (ATEN.mm.default, (matrix, square)),
        "bmm": (ATEN.bmm.default, (batches, batches.transpose(1, 2))),
        "addmm": (ATEN.addmm.default, (torch.ones(5), matrix, square)),
        "gelu": (ATEN.gelu.default, (x,)),
        "hardswish": (ATEN.hardswish.default, (x,)),
        "silu": (ATEN.silu.default, (x,)),
        "_softmax": (ATEN._softmax.default, (x, -1, False)),
        "_softmax_backward_data": (ATEN._softmax_backward_data.default, (x, x, -1, torch.float32)),
        "gelu_backward": (ATEN.gelu_backward.default, (x, x)),
        "hardswish_backward": (ATEN.hardswish_backward.default, (x, x)),
        "silu_backward": (ATEN.silu_backward.default, (x, x)),
        "threshold_backward": (ATEN.threshold_backward.default, (x, x, 0)),
        "native_batch_norm": (ATEN.native_batch_norm.default, norm),
        "native_batch_norm_backward": (
            ATEN.native_batch_norm_backward.default,
            (x, x, weight, mean, mean, mean, mean, True, 1e-5, [True, True, False]),
        ),
        "native_layer_norm": (ATEN.native_layer_norm.default, (x, [last], row, row, 1e-5)),
        "native_layer_norm_backward": (
            ATEN.native_layer_norm_backward.default,
            (x, x, [last], rows, rows, row, row, [True, False, True]),
        ),
    }


def described(results: Any, inputs: list[Any]) -> list[Any]:
    """How results lie, and whose storage they share."""
    found: list[Any] = []
    for each in results if isinstance(results, (tuple, list)) else [results]:
        if each is None or each.numel() == 0:
            found.append(None)
            continue
        shared = any(each.untyped_storage()._cdata == x.untyped_storage()._cdata for x in inputs)
        found.append((tuple(each.shape), each.stride(), each.dtype, each.storage_offset(), each.device.type, shared))
    return found


def tensors_in(arguments: Any) -> list[Any]:
    if isinstance(arguments, torch.Tensor):
        return [arguments]
    return [t for each in arguments for t in tensors_in(each)] if isinstance(arguments, (tuple, list)) else []


@pytest.mark.parametrize("look", LOOKS)
@pytest.mark.parametrize("name", sorted({*COMPILED, *LIKE, "aten.native_layer_norm"}))
def test_results_lie_as_those_of_the_kernels(name: str, look: str) -> None:
    """Shape, strides, dtype, offset and storage of the real result, or no short way at all."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    torch.manual_seed(0)
    x = LOOKS[look](torch.rand(2, 3, 4, 6))
    func, arguments = cases(x)[name.removeprefix("aten.")]
    with FakeTensorMode() as mode:
        fakes = torch.utils._pytree.tree_map_only(torch.Tensor, mode.from_tensor, arguments)
        found = shortcut(name, func, fakes, {})
    if found is None:
        assert name in {*LIKE, "aten.native_layer_norm"}
        assert look != "contiguous"
        return
    real = func(*arguments)
    assert described(found, tensors_in(fakes)) == described(real, tensors_in(arguments))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("aten.add", "two dtypes"),
        ("aten.add", "a remembered value"),
        ("aten.native_batch_norm", "statistics that are given"),
        ("aten.native_layer_norm", "no weights"),
        ("aten.silu", "an option"),
        ("aten.convolution", "another operation"),
    ],
)
def test_what_is_not_plain_goes_the_long_way(name: str, why: str) -> None:
    """Where results depend on more than layouts, PyTorch is asked."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        x, half = torch.empty(2, 3, 4, 4), torch.empty(2, 3, 4, 4, dtype=torch.float16)
        weight = torch.empty(3)
        given: dict[str, tuple[Any, ...]] = {
            "two dtypes": (x, half),
            "a remembered value": (torch.tensor(2), torch.tensor(3)),
            "statistics that are given": (x, weight, weight, weight, weight, False, 0.1, 1e-5),
            "no weights": (x, [4], None, None, 1e-5),
            "an option": (x,),
            "another operation": (x, x),
        }
        del mode
        func = getattr(ATEN, name.removeprefix("aten."))
        options = {"out": x} if why == "an option" else {}
        assert shortcut(name, getattr(func, func.overloads()[0]), given[why], options) is None
