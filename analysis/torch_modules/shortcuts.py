"""Operations on shapes alone in a fraction of the time that PyTorch's way through its fake tensors takes.

A fake tensor stands on one of the device "meta", which has a layout and no data. Where an operation has a compiled
function for such tensors, it is asked at once; where the result lies as an argument does, it is made like that one.
Everything else, and whatever is not plain, goes PyTorch's way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

COMPILED = frozenset({
    "aten.view", "aten._unsafe_view", "aten.t", "aten.transpose", "aten.permute", "aten.slice", "aten.select",
    "aten.unsqueeze", "aten.squeeze", "aten.expand", "aten.detach", "aten.slice_backward", "aten.cat", "aten.clone",
    "aten.add", "aten.sub", "aten.mul", "aten.div", "aten.sum", "aten.mm", "aten.bmm", "aten.addmm",
})  # fmt: skip
"""Operations whose compiled function of shapes gives the layout that the kernels of a CPU give."""

LIKE: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("aten.gelu", "aten.hardswish", "aten.silu", "aten._softmax", "aten._softmax_backward_data"), (0,)),
    **dict.fromkeys(("aten.gelu_backward", "aten.hardswish_backward", "aten.silu_backward"), (1,)),
    "aten.threshold_backward": (1,),
    "aten.native_batch_norm": (0, 1, 2), "aten.native_batch_norm_backward": (1, 2, 2),
    "aten.native_layer_norm_backward": (1, 5, 6),
}  # fmt: skip
"""Arguments like which the results are, one after the other."""


def shortcut(name: str, func: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
    """The result of an operation on fake tensors of one kind, or None where PyTorch has to be asked."""
    if name in COMPILED:
        return _compiled(func, arguments, options)
    if options:
        return None
    if name == "aten.native_layer_norm":
        return _layer_norm(*arguments)
    return _like(name, arguments) if name in LIKE else None


def _compiled(func: Any, arguments: Sequence[Any], options: Mapping[str, Any]) -> Any:
    from torch._subclasses.fake_tensor import FakeTensor, in_kernel_invocation_manager

    first = arguments[0]
    listed = list(first) if isinstance(first, (list, tuple)) else [first]
    tensors = [*listed, *(each for each in arguments[1:] if hasattr(each, "dtype"))]
    if not _alike(tensors) or any(hasattr(each, "dtype") for each in options.values()):
        return None
    mode, device = tensors[0].fake_mode, tensors[0].fake_device
    with in_kernel_invocation_manager(mode):
        result = func(*arguments, **options)
    return FakeTensor(mode, result, device)


def _like(name: str, arguments: Sequence[Any]) -> Any:
    """Results that are made like arguments, all of them contiguous; None in place of gradients that nobody wants."""
    models = [arguments[position] for position in LIKE[name]]
    if not _plain([arguments[0], *models]):
        return None
    wanted = [True] * len(models)
    if name.endswith("norm_backward"):
        wanted = list(arguments[-1])
    training = {"aten.native_batch_norm": 5, "aten.native_batch_norm_backward": 7}.get(name)
    if training is not None and not arguments[training]:  # statistics that are given are kept nowhere
        return None
    made = [_made(model, model.shape) if is_wanted else None for model, is_wanted in zip(models, wanted, strict=True)]
    return made[0] if len(made) == 1 else tuple(made)


def _layer_norm(x: Any, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> Any:
    """The result, and mean and inverse deviation of every row."""
    if not _plain([x, weight, bias]):
        return None
    rows = (*x.shape[: x.ndim - len(shape)], *(1 for _ in shape))
    return _made(x, x.shape), _made(x, rows), _made(x, rows)


def _plain(tensors: Sequence[Any]) -> bool:
    return _alike(tensors) and all(each.is_contiguous() for each in tensors)


def _alike(tensors: Sequence[Any]) -> bool:
    """Whether all are fake tensors of one mode, device and dtype, and none has a value that PyTorch remembers."""
    from torch._subclasses.fake_tensor import FakeTensor

    if not all(isinstance(each, FakeTensor) and each.constant is None for each in tensors):
        return False
    kinds = {(id(each.fake_mode), each.fake_device, each.dtype) for each in tensors}
    return len(kinds) == 1


def _made(model: Any, shape: Sequence[int]) -> Any:
    import torch
    from torch._subclasses.fake_tensor import FakeTensor

    with torch._C._DisableTorchDispatch():
        result = torch.empty(shape, dtype=model.dtype, device="meta")
    return FakeTensor(model.fake_mode, result, model.fake_device)
