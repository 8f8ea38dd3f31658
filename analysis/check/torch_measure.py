"""A real step of a PyTorch module beside its prediction: every byte that autograd keeps, and every multiply-add.

Two witnesses: the same observer watches a step with numbers, module by module; and PyTorch's own counter counts a
second one. Its formulas lack three things, which are put in: the groups of a convolution's weight gradient, attention
on CPUs, and the LSTM layers of oneDNN.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from analysis.check.measure import Comparison
from analysis.commands.memory import check_memory
from analysis.torch_modules.losses import loss_of
from analysis.torch_modules.run import Run, copied, prepared, random_numbers_kept, watched_step
from analysis.torch_modules.step import KINDS, TorchStep

if TYPE_CHECKING:
    from analysis.reports.torch_report import TorchPrediction


def compare_module(prediction: TorchPrediction) -> Comparison:
    """Run two real steps of plain backpropagation, and compare them with the prediction."""
    predicted, how = prediction.step, prediction.how
    check_memory(2 * predicted.total_bytes(), f"a step of net {prediction.report.net!r} at batch {predicted.batch}")
    measured = watched_step(prediction.module, prediction.report.net, how, real=True)
    comparison = Comparison()
    comparison.add("bp", "pytorch bytes", predicted.bytes_by_path(), measured.bytes_by_path())
    for kind in KINDS:
        comparison.add("bp", f"{kind} multiply-adds", _of_kind(predicted, kind), _of_kind(measured, kind))
    counted = counted_flops(prediction.module, prediction.report.net, how)
    ours = {"forward": 2 * predicted.total_macs("forward")}
    ours["backward"] = 2 * predicted.total_macs() - ours["forward"]
    for part, flops in ours.items():
        comparison.add("bp", f"FLOPs {part}, FlopCounterMode", {"all layers": flops}, {"all layers": counted[part]})
    comparison.notes.append(
        f"real steps on {how.inputs}; bytes by saved_tensors_hooks, each storage once; PyTorch's counter with the "
        "groups of weight gradients, attention on CPUs and LSTM layers put in"
    )
    others = [method for method in prediction.report.methods if method != "bp"]
    if others:
        comparison.notes.append(f"not run in PyTorch: {', '.join(others)}")
    return comparison


def _of_kind(step: TorchStep, kind: str) -> dict[str, int]:
    return {path: macs for (path, of), macs in step.macs.items() if of == kind}


def counted_flops(module: Any, name: str, how: Run) -> dict[str, int]:
    """FLOPs of the forward pass with the loss, and of the backward pass, by PyTorch's counter in a real step."""
    from torch.utils.flop_counter import FlopCounterMode

    flops: dict[str, int] = {}
    with random_numbers_kept():
        _, own = copied(module, name, real=True)
        inputs, autocast = prepared(own, how)
        with FlopCounterMode(display=False, custom_mapping=_missing()) as counter, autocast:
            loss = loss_of(own(*inputs.args, **inputs.kwargs), how.inputs.batch, how.loss).value
        flops["forward"] = int(counter.get_total_flops())
        with FlopCounterMode(display=False, custom_mapping=_missing()) as counter:
            loss.backward()
        flops["backward"] = int(counter.get_total_flops())
    return flops


def _missing() -> dict[Any, Any]:
    """What PyTorch's counter lacks, on shapes, written for this purpose alone."""
    import torch

    def weight_gradient(
        grad: Any, x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, transposed: bool,
        output_padding: Any, groups: int, mask: Any, out_shape: Any = None, **_: Any,
    ) -> int:  # fmt: skip
        """Of both gradients that are asked for: each output place (transposed: input place) meets the whole weight."""
        places = x if transposed else grad
        return (bool(mask[0]) + bool(mask[1])) * 2 * places[0] * math.prod(places[2:]) * math.prod(weight)

    def attention(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return 2 * math.prod(q[:-1]) * k[-2] * (q[-1] + v[-1])

    def attention_backward(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
        return 2 * math.prod(q[:-1]) * k[-2] * (3 * q[-1] + 2 * v[-1])

    def lstm(x: Any, w: Any, recurrent: Any, *_: Any, **__: Any) -> int:
        return 2 * x[0] * x[1] * (math.prod(w) + math.prod(recurrent))

    aten = torch.ops.aten
    return {
        aten.convolution_backward: weight_gradient,
        aten._scaled_dot_product_flash_attention_for_cpu: attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
        aten.mkldnn_rnn_layer: lstm,
        aten.mkldnn_rnn_layer_backward: lambda *shapes, **others: 2 * lstm(*shapes),
    }
