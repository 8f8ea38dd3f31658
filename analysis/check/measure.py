"""One real training step, and every predicted number beside the measured one.

Bytes and multiply-adds must be equal; the peak of memory, which Python's own objects have a part in, within 5 %.
Measured are the live buffers of the tape (:func:`lance_ref.tape`), the multiply-adds of the products
and loops that ran (:func:`lance_ref.count_macs`), the peak that ``tracemalloc`` sees
(:func:`analysis.peak.memory.measure_peak`), and, with PyTorch installed, what its autograd saves
and its counter counts for the same operations (:mod:`analysis.check.torch_replay`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

import lance_ref
from analysis.check import torch_replay
from analysis.commands.console import blocks, paragraph
from analysis.commands.memory import check_memory
from analysis.commands.names import plain
from analysis.peak.memory import measure_peak
from analysis.rules.account import Billed
from analysis.rules.loss import loss_of
from analysis.rules.op_cost import MAC_KINDS
from analysis.rules.recompute import flatten
from analysis.steps.runs import running
from lance_ref.algebra.kernels.threads import numba_enabled
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.module import Module
from lance_ref.nn.tracing import record

if TYPE_CHECKING:
    from analysis.reports.prediction import Prediction
    from analysis.steps.nets import TracedStep
    from lance_ref.datasets import Dataset

PEAK = "peak bytes"
PEAK_SHARE = 0.05
OBJECT_BYTES, MOST_OBJECT_BYTES = 6 * 1024, 256 * 1024
"""Python's own objects, of each operation and of all, that ``tracemalloc`` may see beside the arrays."""


@dataclass(frozen=True)
class Line:
    """One number, predicted and measured; ``tolerance`` is by how much they may differ."""

    method: str
    layer: str
    what: str
    predicted: int
    measured: int
    tolerance: int = 0

    @property
    def agrees(self) -> bool:
        return abs(self.predicted - self.measured) <= self.tolerance


@dataclass
class Comparison:
    """All numbers of a measurement; prints as a table, differences marked."""

    lines: list[Line] = field(default_factory=list)  #: By layer; the totals are their sums.
    notes: list[str] = field(default_factory=list)  #: What was measured on, and what was left out.

    @property
    def agrees(self) -> bool:
        """Whether every predicted number equals the measured one, or is as near as it has to be."""
        return all(line.agrees for line in self.lines)

    def add(self, method: str, what: str, predicted: Mapping[str, int], measured: Mapping[str, int]) -> None:
        """Compare two counts by layer; a layer that is missing from one counts 0 there."""
        for layer in dict.fromkeys([*predicted, *measured]):
            pair = predicted.get(layer, 0), measured.get(layer, 0)
            if pair != (0, 0):
                self.lines.append(Line(method, plain(layer or "(root)"), what, *pair))

    def add_peak(self, method: str, predicted: int, measured: int, operations: int) -> None:
        """Compare the predicted with the measured peak of a step that has this number of operations."""
        objects = min(OBJECT_BYTES * operations, MOST_OBJECT_BYTES)
        tolerance = max(int(PEAK_SHARE * measured), objects)
        self.lines.append(Line(method, "whole step", PEAK, predicted, measured, tolerance))

    def totals(self) -> list[Line]:
        sums: dict[tuple[str, str], list[int]] = {}
        for line in self.lines:
            of_all = sums.setdefault((line.method, line.what), [0, 0, 0])
            of_all[0] += line.predicted
            of_all[1] += line.measured
            of_all[2] += line.tolerance
        return [Line(method, "total", what, *of_all) for (method, what), of_all in sums.items()]

    def __str__(self) -> str:
        wrong = [line for line in self.lines if not line.agrees]
        shown = [line for line in self.lines if line.what.endswith("bytes")]
        shown += [line for line in wrong if line not in shown]
        sizes = [max(map(len, words), default=0) for words in ([x.method for x in shown], [x.layer for x in shown])]
        columns = ["method, layer, what", "predicted", "measured", *["verdict"] * bool(wrong)]
        rows = []
        for group in (shown, self.totals()):
            rows.append([""] * len(columns))
            for x in group:
                name = f"{x.method:{sizes[0]}}  {x.layer:{sizes[1]}}  {x.what}"
                cells = [name, f"{x.predicted:,}", f"{x.measured:,}", "" if x.agrees else "DIFFERS"]
                rows.append(cells[: len(columns)])
        verdict = f"{len(wrong) or 'no'} difference{'s' if len(wrong) > 1 else ''}"
        notes = [*self.notes, f"{len(self.lines)} numbers compared layer by layer: {verdict}"]
        table = blocks(columns, rows)
        return "\n".join(["Predicted beside measured", table, "", *(paragraph(note) for note in notes)])


def compare(prediction: Prediction, data: str | None = None, peaks: bool = False) -> Comparison:
    """Run one real step per method of a prediction with weights, and compare the two.

    ``data`` is what :func:`lance_ref.datasets.open_data` takes, by default the bundled digits. With
    ``peaks`` the peak of memory is measured as well, in two more steps of each method.
    """
    step = prediction.step
    kept = max((sum(bill.tape_bytes for bill in bills) for bills in prediction.bills.values()), default=0)
    inputs = step.records[0].inputs[0].nbytes  # as pixels, planes and floating numbers at the same time
    check_memory(kept + 3 * inputs, f"a step of net {step.name!r} at batch {step.batch}")
    images, labels, name = _batch(data, step)
    comparison = Comparison()
    comparison.notes.append(f"one step on {len(images)} images of {name}, fresh weights, random factors")
    comparison.notes += [f"{method}: left out: {why}" for method, why in prediction.report.notes.items()]
    for method, bills in prediction.bills.items():
        changed = prediction.steps[method]
        with running(step, method, changed):
            _compare_step(comparison, method, step.net, images, labels, bills, changed.repeats)
    if peaks:
        _compare_peaks(comparison, prediction, images, labels)
    _compare_with_pytorch(comparison, prediction)
    return comparison


def _compare_step(
    comparison: Comparison,
    method: str,
    net: Module,
    images: np.ndarray,
    labels: np.ndarray,
    bills: Sequence[Billed],
    repeats: int,
) -> None:
    """Run a step, in ``repeats`` parts, each on its own tape: the tape is that of the last, the work that of all."""
    net.zero_grad()
    with lance_ref.count_macs() as counter:
        for x, y in zip(np.split(images, repeats), np.split(labels, repeats), strict=True):
            with record(net) as records:
                loss = loss_of(net(Tensor(x.copy())), Tensor(y.copy()))
            tape = lance_ref.tape(loss)
            loss.backward()
    net.zero_grad()
    traced, ran = [(b.record.op, b.record.path) for b in bills], [(r.op, r.path) for r in flatten(records)]
    if traced != ran:
        same = next(
            (i for i, (a, b) in enumerate(zip(traced, ran, strict=False)) if a != b), min(len(traced), len(ran))
        )
        raise ValueError(
            f"the real step ran other operations than the trace, from number {same} on; is forward() random?"
        )
    comparison.add(method, "tape bytes", _by_path(bills, "tape_bytes"), tape.by_layer())
    factors = {path: m.store.factor_bytes for path, m in net.named_modules() if hasattr(m, "store")}
    comparison.add(method, "factor bytes", _by_path(bills, "subspace_bytes"), factors)
    for kind in MAC_KINDS:
        predicted: defaultdict[str, int] = defaultdict(int)
        for bill in bills:
            predicted[bill.record.path] += getattr(bill.cost, f"{kind}_macs")
        measured = {path: macs for (path, counted), macs in counter.macs.items() if counted == kind}
        comparison.add(method, f"{kind} multiply-adds", predicted, measured)


def _compare_peaks(comparison: Comparison, prediction: Prediction, images: np.ndarray, labels: np.ndarray) -> None:
    """The peak of every method, in whole steps of their own."""
    if not numba_enabled():
        comparison.notes.append("peak of memory: not measured: it is predicted for the compiled loops, which are off")
        return
    step, optimizer = prediction.step, prediction.report.optimizer
    for method, peak in prediction.report.peaks.items():
        changed = prediction.steps[method]
        with running(step, method, changed):
            measured = measure_peak(step.net, images, labels, optimizer, changed.repeats)
        if peak.estimated and measured <= peak.peak_bytes:
            comparison.notes.append(
                f"peak of memory of {method}: not compared: at most {peak.peak_bytes:,} bytes, measured {measured:,}; "
                f"no rule for {', '.join(peak.estimated)}"
            )
            continue
        comparison.add_peak(method, peak.peak_bytes, measured, len(prediction.bills[method]))
    comparison.notes.append(
        f"peaks of memory, with {optimizer}, agree within {PEAK_SHARE:.0%}, or {OBJECT_BYTES // 1024} KiB for each "
        f"operation, at most {MOST_OBJECT_BYTES // 1024} KiB, for Python's own objects; all other numbers must be equal"
    )


def _by_path(bills: Sequence[Billed], what: str) -> dict[str, int]:
    sums: defaultdict[str, int] = defaultdict(int)
    for bill in bills:
        sums[bill.record.path] += getattr(bill, what)
    return sums


def _compare_with_pytorch(comparison: Comparison, prediction: Prediction) -> None:
    if not torch_replay.available():
        comparison.notes.append("PyTorch's column: skipped: PyTorch is not installed")
        return
    comparison.notes.append(f"PyTorch's column: the same operations replayed in PyTorch {torch_replay.version()}")
    for method, bills in prediction.bills.items():
        stores = prediction.steps[method].stores
        if prediction.steps[method].facts.get("updated"):
            comparison.notes.append(f"PyTorch's column of {method}: not replayed: PyTorch has no such update")
            continue
        if {store["name"] for store in stores.values()} - {"lance"}:
            comparison.notes.append(f"PyTorch's column of {method}: not replayed: PyTorch has no such layer")
            continue
        ranks = {path: store["ranks"] for path, store in stores.items()}
        whole = [bill for bill in bills if not bill.in_segment]
        records = [bill.record for bill in whole]
        try:
            saved = torch_replay.saved_bytes(records, ranks)
        except LookupError as error:  # an operation of the user's own
            comparison.notes.append(f"PyTorch's column of {method}: not replayed: {error}")
            continue
        predicted = {bill.name: bill.pytorch_bytes for bill in bills}
        comparison.add(method, "pytorch bytes", predicted, {b.name: n for b, n in zip(whole, saved, strict=True)})
        if method != "bp":
            continue
        try:
            counted = torch_replay.flops(records)
        except LookupError as error:
            comparison.notes.append(f"PyTorch's FLOP counter: skipped: {error}")
            continue
        times = prediction.steps[method].repeats
        forward = sum(2 * bill.cost.forward_macs for bill in bills)
        costs = [bill.cost for bill in bills]
        backward = sum(2 * (cost.grad_input_macs + cost.grad_weight_macs + cost.recompute_macs) for cost in costs)
        reworked = torch_replay.with_groups_reworked(flatten(records))
        if reworked:
            comparison.notes.append(
                "PyTorch's FLOP counter forgets groups in the weight gradient; counted as one group on as many times "
                f"the images: {', '.join(reworked)}"
            )
        for what, ours, theirs in (("forward", forward, counted.forward), ("backward", backward, counted.backward)):
            counts = {"all layers": ours}, {"all layers": times * theirs}
            comparison.add(method, f"FLOPs {what}, FlopCounterMode", *counts)


def _images(data: str | None, size: tuple[int, int]) -> Dataset:
    """The data set that was asked for; its pictures are resized when they are taken, those of a folder now."""
    from lance_ref import datasets

    if data is None:
        return datasets.load("digits")
    return datasets.open_data(data, "test", size, labelled=False)


def _batch(data: str | None, step: TracedStep) -> tuple[np.ndarray, np.ndarray, str]:
    """One batch of real images in the shape that the net takes, labels that it has outputs for, and their name.

    A data set smaller than the batch is used again from its start; grey channels are repeated; a net for anything but
    images (channels, height, width) gets the pixels of a square image, as many as it takes, in its shape.
    """
    from lance_ref.datasets import resize

    value = step.records[0].inputs[0]
    batch, shape = step.batch, step.input_shape
    side = math.isqrt(math.prod(shape) - 1) + 1
    size = (shape[1], shape[2]) if len(shape) == 3 else (side, side)
    dataset = _images(data, size)
    chosen = np.resize(np.random.default_rng(0).permutation(len(dataset)), batch)
    pixels = resize(dataset.images[chosen], size)  # (B, H, W, C)
    floating = value.dtype if value.dtype.startswith("float") else "float32"
    planes = pixels.transpose(0, 3, 1, 2).astype(floating) / 255  # (B, C, H, W)
    if len(shape) == 3:
        images = planes[:, np.arange(shape[0]) % planes.shape[1]]
    else:
        images = planes.mean(axis=1).reshape(batch, -1)[:, : math.prod(shape)].reshape(batch, *shape)
    if not value.dtype.startswith("float"):  # indices or a mask: zeros and ones are among all of them
        images = np.rint(images)
    return (
        np.ascontiguousarray(images, dtype=value.dtype),
        dataset.labels[chosen] % max(step.num_classes, 1),
        dataset.name,
    )
