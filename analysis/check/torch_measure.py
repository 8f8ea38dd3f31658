"""A real step of a PyTorch module beside its prediction: every byte that autograd keeps, and every multiply-add.

Two witnesses: the same observer watches a step with numbers, module by module; and PyTorch's own counter counts a
second one. Its formulas lack four things, which are put in: the groups of a convolution's weight gradient, attention
on CPUs, the LSTM layers of oneDNN, and grouped products. Where the report has a tape, a third step runs by this
library's operations, and its tape is measured.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import lance_ref
from analysis.check.measure import Comparison
from analysis.commands.memory import check_memory
from analysis.torch_modules.losses import loss_of
from analysis.torch_modules.methods import real_stores
from analysis.torch_modules.own_tape import real_step
from analysis.torch_modules.run import Run, copied, prepared, random_numbers_kept, watched_step
from analysis.torch_modules.step import KINDS, TorchStep

if TYPE_CHECKING:
    from analysis.reports.torch_report import TorchPrediction


def compare_module(prediction: TorchPrediction) -> Comparison:
    """Run real steps of plain backpropagation, and compare them with the prediction."""
    predicted, how = prediction.step, prediction.how
    check_memory(3 * predicted.total_bytes(), f"a step of net {prediction.report.net!r} at batch {predicted.batch}")
    measured = watched_step(prediction.module, prediction.report.net, how, real=True)
    comparison = Comparison()
    comparison.add("bp", "pytorch bytes", predicted.bytes_by_path(), measured.bytes_by_path())
    if prediction.report.no_tape:
        comparison.notes.append(f"tape: not compared: {prediction.report.no_tape}")
    else:
        _compare_tapes(comparison, prediction)
    for kind in KINDS:
        comparison.add("bp", f"{kind} multiply-adds", _of_kind(predicted, kind), _of_kind(measured, kind))
    real = real_totals(prediction.module, prediction.report.net, how)
    total = Totals.of(predicted)
    for what in ("forward", "backward"):
        of_ours, counted = getattr(total, f"{what}_flops"), getattr(real, f"{what}_flops")
        comparison.add("bp", f"FLOPs {what}, FlopCounterMode", {"all layers": of_ours}, {"all layers": counted})
    comparison.add("bp", "bytes, hooks alone", {"all layers": total.kept_bytes}, {"all layers": real.kept_bytes})
    comparison.notes.append(
        f"real steps on {how.inputs}; bytes by saved_tensors_hooks, each storage once; PyTorch's counter with the "
        "groups of weight gradients, attention on CPUs, LSTM layers and grouped products put in"
    )
    others = [method for method in prediction.report.methods if method != "bp"]
    if others:
        comparison.notes.append(f"not run in PyTorch: {', '.join(others)}")
    return comparison


def _compare_tapes(comparison: Comparison, prediction: TorchPrediction) -> None:
    """A real step of every method by this library's operations, whose tape is measured."""
    report, step = prediction.report, prediction.step
    for method in report.methods:
        how = replace(prediction.how, tune="head") if method == "head-only" else prediction.how
        stores = real_stores(method, step, prediction.ranks.get(method, {}), prediction.settings)
        found = lance_ref.tape(real_step(prediction.module, report.net, how, stores).loss).by_layer()
        rows = [row for row in report.rows if method in row.methods]
        predicted = {row.path: row.methods[method].activation_bytes["tape"] for row in rows}
        comparison.add(method, "tape bytes", predicted, found)


def _of_kind(step: TorchStep, kind: str) -> dict[str, int]:
    return {path: macs for (path, of), macs in step.macs.items() if of == kind}


class Totals(NamedTuple):
    """The totals of one step."""

    kept_bytes: int
    forward_flops: int  #: With the loss.
    backward_flops: int

    @classmethod
    def of(cls, step: TorchStep) -> Totals:
        """Those of a step that was watched or predicted."""
        forward = 2 * step.total_macs("forward")
        return cls(step.total_bytes(), forward, 2 * step.total_macs() - forward)


def real_totals(module: Any, name: str, how: Run) -> Totals:
    """A real step by PyTorch's hooks and counter alone, with nothing of the observer that predictions come from."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    kept: dict[int, Any] = {}

    def keep(tensor: Any) -> Any:
        for part in (tensor.indices(), tensor.values()) if getattr(tensor, "is_sparse", False) else (tensor,):
            if part is not None:
                kept[part.untyped_storage()._cdata] = part.untyped_storage()
        return tensor

    with random_numbers_kept():
        _, own = copied(module, name, real=True)
        inputs, autocast = prepared(own, how)
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with FlopCounterMode(display=False, custom_mapping=_missing()) as forward, autocast, hooks:
            loss = loss_of(own(*inputs.args, **inputs.kwargs), how.inputs.batch, how.loss).value
        with FlopCounterMode(display=False, custom_mapping=_missing()) as backward:
            loss.backward()
    own_storages = {tensor.untyped_storage()._cdata for tensor in (*own.parameters(), *own.buffers())}
    total = sum(storage.nbytes() for key, storage in kept.items() if key not in own_storages)
    return Totals(int(total), int(forward.get_total_flops()), int(backward.get_total_flops()))


def _missing() -> dict[Any, Any]:
    """What PyTorch's counter lacks, on shapes, written for this purpose alone."""
    import torch

    def weight_gradient(
        grad: Any, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
        output_padding: Any, groups: int, mask: Any, out_shape: Any = None, **_: Any,
    ) -> int:  # fmt: skip
        """Multiply-adds of the gradients: each output place (transposed: input place) meets the whole weight."""
        places = x if transposed else grad
        return (bool(mask[0]) + bool(mask[1])) * 2 * places[0] * math.prod(places[2:]) * math.prod(weight)

    def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])

    def attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return 2 * math.prod(q[:-1]) * k[-2] * (3 * q[-1] + 2 * v[-1])

    def lstm(x: Any, w: Any, recurrent: Any, *_: Any, **__: Any) -> int:
        return 2 * x[0] * x[1] * (math.prod(w) + math.prod(recurrent))

    def grouped(a: Any, b: Any, *_: Any, **__: Any) -> int:
        return 2 * math.prod(a) * b[-1] if len(a) == 2 or len(b) == 3 else 2 * a[1] * a[2] * b[-1]

    aten = torch.ops.aten
    return {
        aten._grouped_mm: grouped,
        aten.convolution_backward: weight_gradient,
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
        aten.mkldnn_rnn_layer: lstm,
        aten.mkldnn_rnn_layer_backward: lambda *shapes, **others: 2 * lstm(*shapes),
    }
