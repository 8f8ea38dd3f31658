"""The report of a PyTorch module: what PyTorch keeps and computes, and what methods would make of it, as a value."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from analysis.reports.report import MethodCost, Report, Row
from analysis.rules.calibration_costs import CalibrationCost, calibration_cost
from analysis.rules.op_cost import MAC_KINDS
from analysis.steps.methods import METHODS
from analysis.steps.nets import check_classes
from analysis.steps.settings import NotApplicableError, Settings
from analysis.torch_modules.methods import check_method, paper_bytes, record_of, store_costs
from analysis.torch_modules.own_tape import with_tape
from analysis.torch_modules.run import Run, watched_step
from analysis.torch_modules.step import TorchStep

if TYPE_CHECKING:
    from analysis.rules.stores import StoreCost
    from analysis.steps.settings import Ranks


@dataclass(frozen=True)
class TorchAsked:
    """What was asked for, beside the module and its run."""

    methods: tuple[str, ...]
    epsilon: float
    ranks: str | None
    spectra: str | None
    settings: Settings
    num_classes: int | None = None


@dataclass(frozen=True)
class TorchPrediction:
    """A report of a PyTorch module, with what a measurement needs beside it."""

    module: Any
    how: Run
    step: TorchStep  #: Of plain backpropagation.
    report: Report
    ranks: Mapping[str, Mapping[str, Ranks]] = field(default_factory=dict)  #: By method, then by layer.
    settings: Settings = field(default_factory=Settings)


def predict_module(module: Any, name: str, how: Run, asked: TorchAsked) -> TorchPrediction:
    """What one training step of a PyTorch module keeps and computes, on shapes alone.

    Raises ValueError where a method does not fit; see :func:`analysis.torch_modules.run.watched_step` for the others.
    """
    step = with_tape(watched_step(module, name, how), module, name, how)
    if asked.num_classes is not None:
        check_classes(name, asked.num_classes, step.classes or 0)
    made = _Methods(step, name, asked)
    notes: dict[str, str] = {}
    for method in asked.methods:
        try:
            check_method(method, asked.settings)
            if method == "head-only":
                head = replace(how, tune="head")
                made.add(method, with_tape(watched_step(module, name, head), module, name, head))
            else:
                made.add(method, step)
        except NotApplicableError as error:
            if set(asked.methods) != set(METHODS):
                raise ValueError(f"method {method!r} does not fit net {name!r}: {error}") from None
            notes[method] = str(error)
    return TorchPrediction(module, how, step, made.report(notes, how), made.ranks, asked.settings)


class _Methods:
    """The costs of every method, module by module."""

    def __init__(self, step: TorchStep, name: str, asked: TorchAsked) -> None:
        from analysis.ranks.choose import choose_ranks

        self.step, self.name, self.asked = step, name, asked
        self.shapes = {path: layer.shape for path, layer in step.compressible.items()}
        self.choice = None
        if any(METHODS[method].ranks is not None for method in asked.methods):
            self.choice = choose_ranks(self.shapes, name, step.input_shape, asked.epsilon, asked.ranks, asked.spectra)
        self.costs: dict[str, dict[str, MethodCost]] = {}  # by method, then by path
        self.ranks: dict[str, dict[str, Ranks]] = {}
        self.no_tape = step.no_tape
        self.calibration: dict[str, CalibrationCost] = {}

    def ranks_of(self, method: str) -> dict[str, Ranks]:
        """The ranks of a method, by layer; none for a method without ranks."""
        from analysis.ranks.choose import mean_free

        kind = METHODS[method].ranks
        if kind is None or self.choice is None:
            return {}
        try:
            return dict(self.choice.ranks) if kind == "given" else mean_free(self.choice.ranks, self.shapes)
        except ValueError as error:
            raise NotApplicableError(str(error)) from None

    def add(self, method: str, step: TorchStep) -> None:
        """Account for a method that makes this of the step."""
        ranks = self.ranks[method] = self.ranks_of(method)
        stores = store_costs(method, step, ranks, self.asked.settings)
        kept, tape = step.bytes_by_path(stores), step.bytes_by_path(stores, tape=True)
        self.no_tape = self.no_tape or step.no_tape
        paths = dict.fromkeys([*(seen.path for seen in step.modules), *kept, *tape, *(path for path, _ in step.macs)])
        self.costs[method] = {
            path: _cost(step, path, kept.get(path, 0), tape.get(path, 0), stores.get(path)) for path in paths
        }
        kind = METHODS[method].calibration
        if kind is not None:
            self.calibration[method] = self._calibration(method, kind, ranks, stores)

    def _calibration(
        self, method: str, kind: str, ranks: Mapping[str, Ranks], stores: Mapping[str, StoreCost]
    ) -> CalibrationCost:
        layers = self.step.compressible
        records = [record_of(layers[path]) for path in stores for _ in range(layers[path].calls)]
        hosvd = store_costs("hosvd", self.step, ranks, self.asked.settings)

        def work(costs: Mapping[str, StoreCost]) -> int:
            return sum(layers[path].calls * (c.decomposition_macs + c.projection_macs) for path, c in costs.items())

        forward = self.step.total_macs("forward")
        batches = self.asked.settings.calibration_batches
        return calibration_cost(records, forward, ranks, batches, kind, work(hosvd) - work(stores))

    def report(self, notes: dict[str, str], how: Run) -> Report:
        """All of it as a report."""
        step, asked = self.step, self.asked
        shape = step.input_shape
        return Report(
            net=self.name,
            batch=step.batch,
            image_size=shape[1] if len(shape) == 3 and shape[1] == shape[2] else None,
            num_classes=step.classes,
            dtype=step.dtype if how.autocast is None else f"{step.dtype}, autocast {how.autocast}",
            convention="flops",
            tuned_layers=step.tuned_layers,
            ranks_from=self.choice.source if self.choice else "not needed: no method compresses",
            methods=tuple(self.costs),
            rows=tuple(self._rows()),
            calibration=self.calibration,
            settings={method: asked.settings.of(METHODS[method].names) for method in self.costs},
            notes=notes,
            net_parameters=step.parameters,
            remark=" ".join(remarks(step)),
            no_tape=self.no_tape,
        )

    def _rows(self) -> list[Row]:
        seen = {each.path: each for each in self.step.modules}
        rows = []
        for path in dict.fromkeys(path for costs in self.costs.values() for path in costs):
            costs = {method: of[path] for method, of in self.costs.items() if path in of}
            if self.no_tape:  # of one method: then no column has it, for ratios compare the methods
                costs = {method: _without_tape(cost) for method, cost in costs.items()}
            if all(cost.is_free for cost in costs.values()):
                continue
            part, layer = seen.get(path), self.step.layers.get(path)
            rows.append(
                Row(
                    name=path or "(root)",
                    op=part.kind if part else "loss",
                    path=path,
                    input_shape=part.input_shape if part else (),
                    output_shape=part.output_shape if part else (),
                    weight_shape=layer.weight_shape if layer else None,
                    parameters=part.parameters if part else 0,
                    tuned=path in self.step.tuned_layers,
                    methods=costs,
                )
            )
        return rows


def _cost(step: TorchStep, path: str, kept: int, tape: int, store: StoreCost | None) -> MethodCost:
    """What one module keeps, with this store for its input if there is one, and computes in all of its calls."""
    layer = step.layers.get(path)
    counts = dict.fromkeys(MAC_KINDS, 0) | {kind: macs for (of, kind), macs in step.macs.items() if of == path}
    paper = paper_bytes(layer) if layer is not None and path in step.tuned_layers else 0
    if store is None or layer is None:
        return _method_cost(None, {"paper": paper, "pytorch": kept, "tape": tape}, 0, counts)
    calls = layer.calls
    counts["grad_weight"] = calls * store.grad_weight_macs
    counts["projection"] = calls * store.projection_macs
    counts["decomposition"] = calls * store.decomposition_macs
    if store.grad_input_macs is not None and counts["grad_input"]:
        counts["grad_input"] = calls * store.grad_input_macs
    held, on_tape = (sum(saved.storage.nbytes for saved in of or ()) for of in (store.pytorch, store.tape))
    of_layer = {"paper": store.kept_bytes, "pytorch": held, "tape": on_tape}
    others = {"paper": 0, "pytorch": kept, "tape": tape}
    total = {name: others[name] + calls * nbytes for name, nbytes in of_layer.items()}
    return _method_cost(store.ranks, total, store.subspace_bytes, counts)


def _without_tape(cost: MethodCost) -> MethodCost:
    kept = {name: nbytes for name, nbytes in cost.activation_bytes.items() if name != "tape"}
    return replace(cost, activation_bytes=kept)


def _method_cost(ranks: Ranks | None, kept: dict[str, int], factors: int, macs: Mapping[str, int]) -> MethodCost:
    flops = {kind: 2 * macs[kind] for kind in MAC_KINDS}
    return MethodCost(ranks, kept, factors, {**flops, "total": sum(flops.values())}, None)


def remarks(step: TorchStep) -> Sequence[str]:
    """What a reader must know of a step: its loss, what trains, what stays exact, and what is not counted."""
    share = f"{step.trained_parameters:,} of {step.parameters:,} parameters train"
    said = [
        f"{step.loss}; {share}.",
        "Bytes and products are those that PyTorch shows for this module: each storage once, parameters and buffers "
        "left out.",
    ]
    exact: dict[str, list[str]] = {}
    for path in step.tuned_layers:
        exact.setdefault(step.layers[path].exact, []).append(path)
    for why, paths in exact.items():
        if why:
            listed = ", ".join(paths[:4]) + (f" and {len(paths) - 4} more" if len(paths) > 4 else "")
            said.append(f"Methods leave the input of {listed} as it is: {why}.")
    if step.uncounted:
        said.append(f"Not counted, for want of a rule: the multiply-adds of {', '.join(step.uncounted)}.")
    return [*said, *step.remarks]
