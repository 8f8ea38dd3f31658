"""What PyTorch keeps of single products and norms: our rule against its own hooks, storage by storage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cost_cases import run

from analysis.rules.account import account
from lance_ref import functional as F
from lance_ref import record
from lance_ref.engine.tensor import Tensor

torch = pytest.importorskip("torch")
Leaf = Callable[..., Any]


def conv(trains: str, **options: Any) -> Callable[[Leaf], Any]:
    """The convolution of the case of that name; ``trains`` has an x, a w and a b for input, weight and bias."""
    padding = options.pop("unequal", None)

    def step(leaf: Leaf) -> Any:
        x = leaf(2, 6, 7, 8, grad="x" in trains)
        weight = leaf(4, 6 // options.get("groups", 1), 3, 2, grad="w" in trains)
        bias = leaf(4, grad="w" in trains) if "b" in trains else None
        if padding is not None:
            return padded_conv2d(x, weight, bias, *padding)
        return torch.nn.functional.conv2d(x, weight, bias, **options)

    return step


def padded_conv2d(x: Any, weight: Any, bias: Any, left: int, right: int, top: int, bottom: int) -> Any:
    """As PyTorch's "same" does it: the convolution pads what both sides have, and the odd side is padded before."""
    both = (min(top, bottom), min(left, right))
    odd = (left - both[1], right - both[1], top - both[0], bottom - both[0])
    return torch.nn.functional.conv2d(torch.nn.functional.pad(x, odd), weight, bias, padding=both)


def norm(training: bool, trains: str, affine: bool = True) -> Callable[[Leaf], Any]:
    def step(leaf: Leaf) -> Any:
        x, running = leaf(2, 3, 4, 5, grad="x" in trains), [leaf(3, grad=False).detach() for _ in range(2)]
        weights = [leaf(3, grad="w" in trains) for _ in range(2)] if affine else [None, None]
        return torch.nn.functional.batch_norm(x, *running, *weights, training=training)

    return step


linear = torch.nn.functional.linear
STEPS: dict[str, Callable[[Leaf], Any]] = {
    "matmul": lambda t: t(4, 3) @ t(3, 5),
    "matmul batch": lambda t: t(2, 7, 4, 3) @ t(2, 7, 3, 5),
    "matmul batch, broadcast": lambda t: t(2, 7, 4, 3) @ t(7, 3, 5),
    "matmul batch by matrix": lambda t: t(2, 7, 4, 3) @ t(3, 5),
    "matmul batch by frozen matrix": lambda t: t(2, 7, 4, 3) @ t(3, 5, grad=False),
    "matmul matrix by batch": lambda t: t(4, 3) @ t(2, 3, 5),
    "matmul frozen matrix by batch": lambda t: t(4, 3, grad=False) @ t(2, 3, 5),
    "matmul permuted batch by matrix": lambda t: t(2, 4, 7, 3).permute(0, 2, 1, 3) @ t(3, 5),
    "matmul permuted batch by frozen": lambda t: t(2, 4, 7, 3).permute(0, 2, 1, 3) @ t(3, 5, grad=False),
    "matmul vector": lambda t: t(2, 7, 4, 3) @ t(3),
    "matmul matrix vector": lambda t: t(4, 3) @ t(3),
    "matmul vector matrix": lambda t: t(3) @ t(3, 5),
    "conv2d": conv("xwb"),
    "conv2d frozen weight": conv("xb"),
    "conv2d first layer": conv("w", groups=2, stride=(2, 1), padding=1, dilation=(1, 2)),
    "conv2d unequal padding": conv("xw", unequal=(2, 1, 0, 1)),
    "linear": lambda t: linear(t(4, 5), t(3, 5), t(3)),
    "linear frozen": lambda t: linear(t(4, 5), t(3, 5, grad=False), t(3, grad=False)),
    "linear first layer": lambda t: linear(t(4, 5, grad=False), t(3, 5), t(3)),
    "linear tokens": lambda t: linear(t(4, 7, 5), t(3, 5), t(3)),
    "linear permuted": lambda t: linear(t(4, 5, 7).permute(0, 2, 1), t(3, 5), t(3)),
    "batch_norm frozen": norm(False, "x"),
    "batch_norm frozen, only affine": norm(False, "w"),
    "batch_norm training": norm(True, "xw"),
    "batch_norm training, no affine": norm(True, "x", affine=False),
    "layer_norm": lambda t: torch.nn.functional.layer_norm(t(2, 3, 8), (8,), t(8), t(8)),
    "layer_norm over two": lambda t: torch.nn.functional.layer_norm(t(2, 3, 8), (3, 8)),
}


@pytest.mark.parametrize("name", STEPS)
def test_pytorch_keeps_what_the_rule_says(name: str) -> None:
    """Bytes of every storage once; of norms without weights, biases and running statistics, the module's own."""
    own: set[int] = set()

    def leaf(*shape: int, grad: bool = True) -> Any:
        tensor = torch.rand(shape, requires_grad=grad)
        if "norm" in name and len(shape) == 1:
            own.add(tensor.untyped_storage().data_ptr())
        return tensor

    kept: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = STEPS[name](leaf)
    records, _ = run(name, real=False)
    saved = [s.storage for bill in account(records, None) for s in bill.cost.pytorch]
    ours = {id(storage): storage.nbytes for storage in saved if not ("norm" in name and storage.is_parameter)}
    assert sorted(ours.values()) == sorted(n for n in kept.values() if n)
    assert result.requires_grad


def hooked(step: Callable[[], Any]) -> list[int]:
    """Bytes of each storage that PyTorch keeps."""
    kept: dict[int, int] = {}

    def pack(tensor: Any) -> Any:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        step()
    return sorted(kept.values())


def billed(step: Callable[[], Tensor]) -> list[int]:
    with record() as records:
        step()
    return sorted(s.storage.nbytes for bill in account(list(records), None) for s in bill.cost.pytorch)


@pytest.mark.parametrize("shapes", [((7, 4, 3), (1, 3, 5)), ((2, 7, 4, 3), (1, 7, 3, 5)), ((2, 7, 4, 3), (2, 1, 3, 5))])
def test_pytorch_keeps_matrices_that_a_batch_repeats(shapes: tuple[tuple[int, ...], ...]) -> None:
    """As they are, or packed for each of the others."""
    ours = billed(lambda: F.matmul(*(Tensor.meta(shape, requires_grad=True) for shape in shapes)))
    assert ours == hooked(lambda: torch.matmul(*(torch.rand(shape, requires_grad=True) for shape in shapes)))


def test_pytorch_stacks_a_frozen_batch_for_the_gradient_of_a_matrix() -> None:
    """Permuted matrices against one that trains: a packed copy of theirs."""
    ours = billed(lambda: Tensor.meta((2, 4, 7, 3)).permute(0, 2, 1, 3) @ Tensor.meta((3, 5), requires_grad=True))
    real = hooked(lambda: torch.rand(2, 4, 7, 3).permute(0, 2, 1, 3) @ torch.rand(3, 5, requires_grad=True))
    assert ours == real == [2 * 7 * 4 * 3 * 4]
    base = torch.rand(7, 3, 8)[:, :, :4]
    turned = billed(lambda: Tensor.meta((7, 3, 8))[:, :, :4].permute(0, 2, 1) @ Tensor.meta((3, 5), requires_grad=True))
    assert turned == hooked(lambda: base.permute(0, 2, 1) @ torch.rand(3, 5, requires_grad=True))


@pytest.mark.parametrize("padding", [((0, 1), (2, 2)), ((1, 1), (1, 2)), ((2, 0), (0, 1))])
def test_pytorch_keeps_a_padded_copy_where_one_axis_is_uneven(padding: tuple[tuple[int, int], ...]) -> None:
    """Height or width, or both."""
    shapes = ((2, 3, 7, 8), (4, 3, 3, 2))
    ours = billed(lambda: F.conv2d(*(Tensor.meta(s, requires_grad=True) for s in shapes), padding=padding))
    (top, bottom), (left, right) = padding

    def step() -> Any:
        x, w = (torch.rand(shape, requires_grad=True) for shape in shapes)
        return padded_conv2d(x, w, None, left, right, top, bottom)

    assert ours == hooked(step)
