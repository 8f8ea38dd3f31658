"""The same operations in PyTorch: what its autograd really saves, and what its counter counts.

A list of op records is replayed with random values of the same shapes. ``saved_tensors_hooks`` sees
every tensor that autograd keeps; a storage is billed once, to the first operation that keeps it;
parameters and running statistics are left out. FLOPs come from ``FlopCounterMode``, on tensors
without data.

PyTorch is imported by this module alone, and only when :func:`available` says that it is there.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from analysis.rules.account import WEIGHTED
from analysis.rules.layouts import backward_reaches
from analysis.rules.operations import fill, known
from lance_ref.engine.recording import OpRecord, Value


def available() -> bool:
    """Whether PyTorch is installed."""
    return importlib.util.find_spec("torch") is not None


def version() -> str:
    import torch

    return str(torch.__version__)


class Replay:
    """The values of a replayed step, made when they are first needed; on the device "meta" they are shapes alone."""

    def __init__(self, records: Sequence[OpRecord], device: str = "cpu") -> None:
        import torch

        self.torch = torch
        self.device = device
        self.records = records
        self.values: dict[int, Any] = {}
        self.excluded: list[Any] = []  # parameters and running statistics, which are billed to nobody
        self._maker = {record.output.id: record for record in records if callable(known(record.op).layout)}
        self._largest = {r.inputs[1].id: r.inputs[0].shape[1] for r in records if r.op == "cross_entropy"}  # labels
        self._generator = torch.Generator().manual_seed(0)

    def get(self, value: Value) -> Any:
        """The tensor of a value: computed, or, where nothing computed it, random."""
        if value.id not in self.values:
            maker = self._maker.get(value.id)
            if maker is not None and not maker.output.requires_grad:  # a look at memory that others may keep too
                self.values[value.id] = self.run(maker)
            else:
                self.values[value.id] = self._random(value)
        return self.values[value.id]

    def _random(self, value: Value) -> Any:
        torch = self.torch
        if self.device == "meta":
            tensor = torch.empty(value.shape, dtype=getattr(torch, value.dtype), device="meta")
        elif value.dtype == "bool":
            tensor = torch.ones(value.shape, dtype=torch.bool)
        elif value.dtype.startswith("float"):
            tensor = torch.randn(value.shape, dtype=getattr(torch, value.dtype), generator=self._generator)
        else:
            tensor = torch.randint(0, self._largest.get(value.id, 1), value.shape, generator=self._generator)
        if value.requires_grad:
            tensor.requires_grad_()
        if value.parameter is not None:
            self.excluded.append(tensor)
        return tensor

    def run(self, record: OpRecord, ranks: Sequence[int | None] | None = None) -> Any:
        """Run one operation; with ``ranks`` its layer keeps a core in place of its input."""
        twin = known(record.op).twin
        if twin is None and record.op != "recompute":
            raise LookupError(f"no PyTorch counterpart for operation {record.op!r} in layer {record.path!r}")
        inputs = [self.get(value) for value in record.inputs]
        if twin is None:
            return self._recompute(record, inputs)
        if record.op == "batch_norm":
            self.excluded += _running(inputs, record.attributes)
        if ranks is not None:
            return _keeping_a_core(self.torch, twin, record, inputs, ranks)
        return twin(self.torch, inputs, record.attributes)

    def _recompute(self, record: OpRecord, inputs: list[Any]) -> Any:
        """A segment under PyTorch's own checkpointing, told to run all of it again as we do."""
        from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

        def segment(*tensors: Any) -> Any:
            self.values.update(zip((value.id for value in record.inputs), tensors, strict=True))
            for inside in record.attributes["records"]:
                self.values[inside.output.id] = self.run(inside)
            return self.values[record.output.id]

        with set_checkpoint_early_stop(False):
            return checkpoint(segment, *inputs, use_reentrant=False, preserve_rng_state=False)


def saved_bytes(records: Sequence[OpRecord], ranks: Mapping[str, Sequence[int | None]] | None = None) -> list[int]:
    """Bytes that PyTorch keeps for backward, by record; operations that backward does not come through are not run.

    The convolutions and linear products of the layers (by path) in ``ranks`` keep a core of these ranks.
    """
    replay = Replay(records)
    torch = replay.torch
    kept: list[Any] = []

    def pack(tensor: Any) -> Any:
        kept.append(tensor)
        return tensor

    per_record: list[list[Any]] = []
    for record, on_tape in zip(records, backward_reaches(records), strict=True):
        kept = []
        if on_tape:
            layer_ranks = (ranks or {}).get(record.path) if record.op in WEIGHTED else None
            for value in record.inputs:  # made outside of the hooks
                replay.get(value)
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                replay.values[record.output.id] = replay.run(record, layer_ranks)
        per_record.append(kept)
    excluded = {tensor.untyped_storage()._cdata for tensor in replay.excluded}
    return [_bill(tensors, excluded) for tensors in per_record]


def _bill(tensors: Sequence[Any], billed: set[int]) -> int:
    total = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage._cdata not in billed:
            billed.add(storage._cdata)
            total += storage.nbytes()
    return total


@dataclass(frozen=True)
class Flops:
    """FLOPs as PyTorch's counter counts them."""

    forward: int
    backward: int


def with_groups_reworked(records: Sequence[OpRecord]) -> list[str]:
    """Layers whose FLOPs :func:`flops` counts as one group on as many times the images.

    PyTorch's counter forgets groups in the weight gradient: it would bill these layers ``groups`` times too much.
    """
    return [r.path for r in records if r.op in _CONVOLUTIONS and _forgotten_groups(r.attributes, r.inputs[1])]


_CONVOLUTIONS = ("conv2d", "conv_transpose2d", "conv3d")


def _forgotten_groups(attributes: Mapping[str, Any], weight: Any) -> bool:
    return bool(attributes["groups"] > 1 and weight.requires_grad)


def flops(records: Sequence[OpRecord]) -> Flops:
    """FLOPs of one step according to ``torch.utils.flop_counter.FlopCounterMode``, on shapes alone."""
    from torch.utils.flop_counter import FlopCounterMode

    replay = Replay(records, "meta")
    reached = backward_reaches(records)
    with FlopCounterMode(display=False) as counter:
        for record, on_tape in zip(records, reached, strict=True):
            with nullcontext() if on_tape else replay.torch.no_grad():
                if record.output.id not in replay.values:
                    replay.values[record.output.id] = replay.run(record)
    forward = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        replay.values[records[-1].output.id].backward()
    return Flops(forward, counter.get_total_flops())


# ---- operations ----------------------------------------------------------------------------

Op = Callable[[Any, list[Any], Mapping[str, Any]], Any]


def _reduce(name: str) -> Op:
    def run(torch: Any, inputs: list[Any], attributes: Mapping[str, Any]) -> Any:
        x, dim, keepdim = inputs[0], attributes["dim"], attributes["keepdim"]
        dims = tuple(range(x.dim())) if dim is None else dim
        extra = {"correction": attributes["correction"]} if name == "var" else {}
        return getattr(torch, name)(x, dim=dims, keepdim=keepdim, **extra)

    return run


def _max(torch: Any, inputs: list[Any], attributes: Mapping[str, Any]) -> Any:
    x, dim, keepdim = inputs[0], attributes["dim"], attributes["keepdim"]
    if dim is not None:
        return torch.max(x, dim, keepdim)[0]
    result = torch.max(x)
    return result.reshape((1,) * x.dim()) if keepdim else result


def _index(torch: Any, inputs: list[Any], attributes: Mapping[str, Any]) -> Any:
    """A record tells an array of positions by its shape; any positions will do."""
    x = inputs[0]
    sizes = iter(x.shape)
    parts = []
    for part in attributes["index"]:
        size = 0 if part is None else next(sizes)
        parts.append(torch.randint(0, size, part[1], device=x.device) if isinstance(part, tuple) else part)
    return x[tuple(parts)]


def _pad(torch: Any, inputs: list[Any], attributes: Mapping[str, Any]) -> Any:
    sides = [n for pair in reversed(attributes["padding"]) for n in pair]  # last dimension first
    return torch.nn.functional.pad(inputs[0], sides, value=attributes["value"])


def _conv2d(torch: Any, inputs: list[Any], attributes: Mapping[str, Any]) -> Any:
    F = torch.nn.functional
    x, weight, *bias = inputs
    x, padding = _padded_as_by_pytorch(torch, x, attributes, weight.shape[2:])
    geometry = attributes["stride"], padding, attributes["dilation"]
    if x.is_meta and _forgotten_groups(attributes, weight):
        # Groups are alike, so that their work is the work of one group on as many times the images, and
        # that PyTorch's FLOP counter counts rightly.
        (B, C_in, H, W), groups = x.shape, attributes["groups"]
        y = F.conv2d(x.reshape(B * groups, C_in // groups, H, W), weight.chunk(groups)[0], None, *geometry)
        return y.reshape(B, weight.shape[0], *y.shape[2:])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Using padding='same'")  # that it makes a copy is what we are here for
        return F.conv2d(x, weight, bias[0] if bias else None, *geometry, attributes["groups"])


def _padded_as_by_pytorch(torch: Any, x: Any, attributes: Mapping[str, Any], kernel: Sequence[int]) -> tuple[Any, Any]:
    """The input and the padding that PyTorch is asked for: "same" where it is that, so that its own code decides.

    Other unequal sides it does not know: the difference is padded before, as "same" does.
    """
    (top, bottom), (left, right) = attributes["padding"]
    if (top, left) == (bottom, right):
        return x, (top, left)
    same = [
        (d * (k - 1) // 2, d * (k - 1) - d * (k - 1) // 2) for k, d in zip(kernel, attributes["dilation"], strict=True)
    ]
    if [(top, bottom), (left, right)] == same and tuple(attributes["stride"]) == (1, 1):
        return x, "same"
    rows, columns = min(top, bottom), min(left, right)
    sides = (left - columns, right - columns, top - rows, bottom - rows)
    return torch.nn.functional.pad(x, sides), (rows, columns)


def _conv_transpose2d(torch: Any, inputs: list[Any], attributes: Mapping[str, Any]) -> Any:
    F = torch.nn.functional
    x, weight, *bias = inputs
    a = attributes
    if x.is_meta and _forgotten_groups(a, weight):  # as in :func:`_conv2d`
        (B, C_in, H, W), groups = x.shape, a["groups"]
        x, part = x.reshape(B * groups, C_in // groups, H, W), weight.chunk(groups)[0]
        y = F.conv_transpose2d(x, part, None, a["stride"], a["padding"], a["output_padding"], 1, a["dilation"])
        return y.reshape(B, -1, *y.shape[2:])
    sizes = a["stride"], a["padding"], a["output_padding"], a["groups"], a["dilation"]
    return F.conv_transpose2d(x, weight, bias[0] if bias else None, *sizes)


def _conv3d(torch: Any, inputs: list[Any], attributes: Mapping[str, Any]) -> Any:
    F = torch.nn.functional
    x, weight, *bias = inputs
    sizes = attributes["stride"], attributes["padding"], attributes["dilation"]
    if x.is_meta and _forgotten_groups(attributes, weight):
        (B, C_in, *size), groups = x.shape, attributes["groups"]
        y = F.conv3d(x.reshape(B * groups, C_in // groups, *size), weight.chunk(groups)[0], None, *sizes)
        return y.reshape(B, weight.shape[0], *y.shape[2:])
    return F.conv3d(x, weight, bias[0] if bias else None, *sizes, attributes["groups"])


def _attention(torch: Any, inputs: list[Any], attributes: Mapping[str, Any]) -> Any:
    return torch.nn.functional.scaled_dot_product_attention(
        *inputs, is_causal=attributes["is_causal"], scale=attributes["scale"]
    )


def _group_norm(torch: Any, inputs: list[Any], attributes: Mapping[str, Any]) -> Any:
    x, *affine = inputs
    return torch.nn.functional.group_norm(x, attributes["num_groups"], *(affine or (None, None)), attributes["eps"])


def _instance_norm(torch: Any, inputs: list[Any], attributes: Mapping[str, Any]) -> Any:
    x, *affine = inputs
    weight, bias = affine or (None, None)
    return torch.nn.functional.instance_norm(x, None, None, weight, bias, eps=attributes["eps"])


def _rms_norm(torch: Any, inputs: list[Any], attributes: Mapping[str, Any]) -> Any:
    x, *weight = inputs
    shape = attributes["normalized_shape"]
    return torch.nn.functional.rms_norm(x, shape, weight[0] if weight else None, attributes["eps"])


def _interpolate(torch: Any, inputs: list[Any], attributes: Mapping[str, Any]) -> Any:
    mode = attributes["mode"]
    corners = {} if mode == "nearest" else {"align_corners": attributes["align_corners"]}
    return torch.nn.functional.interpolate(inputs[0], size=attributes["size"], mode=mode, **corners)


def _embedding(torch: Any, inputs: list[Any], attributes: Mapping[str, Any]) -> Any:
    return torch.nn.functional.embedding(*inputs, padding_idx=attributes["padding_idx"])


def _matmul(torch: Any, inputs: list[Any], attributes: Mapping[str, Any]) -> Any:
    a, b = inputs
    if not a.is_meta:
        return a @ b
    row, column = a.dim() == 1, b.dim() == 1  # PyTorch's FLOP counter knows matrices, but no vectors
    result = (a[None] if row else a) @ (b[:, None] if column else b)
    result = result.squeeze(-1) if column else result
    return result.squeeze(-1 if column else -2) if row else result


def _batch_norm(torch: Any, inputs: list[Any], attributes: Mapping[str, Any]) -> Any:
    x, *others = inputs
    weight, bias = others[:2] if attributes["affine"] else (None, None)
    mean, var = _running(inputs, attributes) or (None, None)
    return torch.nn.functional.batch_norm(
        x, mean, var, weight, bias, attributes["training"], attributes["momentum"], attributes["eps"]
    )


def _running(inputs: list[Any], attributes: Mapping[str, Any]) -> list[Any]:
    """Running mean and variance among the inputs of a batch norm, if it has them."""
    return inputs[3:] if attributes["affine"] else inputs[1:]


def _fake_quantize(torch: Any, inputs: list[Any], attributes: Mapping[str, Any]) -> Any:
    if inputs[0].is_meta:  # PyTorch has no shapes alone for it; it has no products either
        return inputs[0] * 1
    names = ("scale", "zero_point", "low", "high")
    return torch.fake_quantize_per_tensor_affine(inputs[0], *(attributes[name] for name in names))


def _layer_norm(torch: Any, inputs: list[Any], attributes: Mapping[str, Any]) -> Any:
    x, *affine = inputs
    weight, bias = affine if affine else (None, None)
    return torch.nn.functional.layer_norm(x, attributes["normalized_shape"], weight, bias, attributes["eps"])


def _named(name: str) -> Op:
    """A function of torch with one argument."""
    return lambda torch, inputs, attributes: getattr(torch, name)(inputs[0])


def _function(name: str, *names: str) -> Op:
    """A function of torch.nn.functional that takes these attributes by name."""
    return lambda torch, inputs, attributes: getattr(torch.nn.functional, name)(
        *inputs, **{key: attributes[key] for key in names}
    )


fill("twin", {
    "add": lambda torch, x, a: x[0] + x[1],
    "sub": lambda torch, x, a: x[0] - x[1],
    "mul": lambda torch, x, a: x[0] * x[1],
    "div": lambda torch, x, a: x[0] / x[1],
    "neg": lambda torch, x, a: -x[0],
    "pow": lambda torch, x, a: x[0] ** a["exponent"],
    "matmul": _matmul,
    "reshape": lambda torch, x, a: x[0].reshape(a["shape"]),
    "permute": lambda torch, x, a: x[0].permute(a["dims"]),
    "concatenate": lambda torch, x, a: torch.cat(x, a["dim"]),
    "index": _index,
    "pad": _pad,
    **{op: _reduce(op) for op in ("sum", "mean", "var")},
    "max": _max,
    **{op: _named(op) for op in ("exp", "sqrt", "tanh", "sigmoid", "log", "erf")},
    "clip": lambda torch, x, a: torch.clamp(x[0], a["low"], a["high"]),
    "expand": lambda torch, x, a: x[0].expand(a["shape"]),
    "fake_quantize": _fake_quantize,
    "gelu_tanh": lambda torch, x, a: torch.nn.functional.gelu(x[0], approximate="tanh"),
    **{op: _function(op) for op in ("gelu", "hardsigmoid", "hardswish", "relu", "relu6", "linear")},
    **{op: _function(op) for op in ("silu", "mish", "prelu")},
    "softplus": _function("softplus", "beta", "threshold"),
    "elu": _function("elu", "alpha"),
    "leaky_relu": _function("leaky_relu", "negative_slope"),
    "glu": _function("glu", "dim"),
    "where": lambda torch, x, a: torch.where(*x),
    "embedding": _embedding,
    "interpolate": _interpolate,
    "scaled_dot_product_attention": _attention,
    "conv_transpose2d": _conv_transpose2d,
    "conv3d": _conv3d,
    "max_pool3d": _function("max_pool3d", "kernel_size", "stride", "padding"),
    "avg_pool3d": lambda torch, x, a: torch.nn.functional.avg_pool3d(
        x[0], a["kernel_size"], a["stride"], a["padding"], count_include_pad=a["count_include_pad"]
    ),
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "rms_norm": _rms_norm,
    "dropout": _function("dropout", "p"),
    **{op: _function(op, "dim") for op in ("softmax", "log_softmax")},
    **{op: _function(op, "reduction") for op in ("cross_entropy", "mse_loss")},
    "conv2d": _conv2d,
    "max_pool2d": _function("max_pool2d", "kernel_size", "stride", "padding", "ceil_mode"),
    "avg_pool2d": _function("avg_pool2d", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad"),
    "adaptive_avg_pool2d": _function("adaptive_avg_pool2d", "output_size"),
    "batch_norm": _batch_norm,
    "layer_norm": _layer_norm,
})  # fmt: skip


def _keeping_a_core(torch: Any, twin: Op, record: OpRecord, inputs: list[Any], ranks: Sequence[int | None]) -> Any:
    """The layer's forward pass with, in place of its input, the core by random orthonormal factors kept."""

    class Compressed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: Any) -> Any:
            core = tensors[0]
            for mode, rank in enumerate(ranks):
                if rank is not None:
                    U = torch.linalg.qr(torch.randn(core.shape[mode], rank, dtype=core.dtype))[0]
                    core = torch.tensordot(core, U, ([mode], [0])).movedim(-1, mode)
            kept = [core.contiguous().clone()] if tensors[1].requires_grad else []
            ctx.save_for_backward(*kept, tensors[1])
            return twin(torch, list(tensors), record.attributes)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            raise NotImplementedError("only what forward keeps is of interest here")

    return Compressed.apply(*inputs)
