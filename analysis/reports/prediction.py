"""The prediction for one training step that was traced: what every method keeps and computes, as a value.

:mod:`analysis.reports.predict` traces a net and asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from analysis.steps.methods import METHODS, method_step
from analysis.steps.settings import NotApplicableError, Settings

if TYPE_CHECKING:
    from analysis.peak.memory import Peak
    from analysis.ranks.choose import RankChoice
    from analysis.reports.report import Continual, Report
    from analysis.rules.account import Billed, CostCache
    from analysis.rules.calibration_costs import CalibrationCost
    from analysis.steps.nets import TracedStep
    from analysis.steps.settings import MethodStep

HIDDEN_FACTS = ("parameters", "asked", "rank", "updated")
"""Facts of a method's step that only a real run needs; reports leave them out."""
Shapes = dict[str, tuple[int, ...]]
Ranks = dict[str, tuple[int | None, ...]]


@dataclass(frozen=True)
class Asked:
    """The arguments of a prediction besides the step: those that also hold for another batch size."""

    epsilon: float = 0.7
    ranks: str | None = None
    spectra: str | None = None
    convention: str = "flops"
    optimizer: str = "sgd"
    settings: Settings = field(default_factory=Settings)
    chunk: int | str | None = None


@dataclass(frozen=True)
class Prediction:
    """Everything from which a report is made."""

    asked: Asked
    step: TracedStep  #: Of plain backpropagation.
    choice: RankChoice | None  #: Where LANCE's ranks come from; None if no method has ranks.
    bills: dict[str, list[Billed]]
    ranks: dict[str, Ranks]  #: Empty for methods that have none.
    steps: dict[str, MethodStep]  #: What each method runs.
    calibration: dict[str, CalibrationCost]
    notes: dict[str, str]  #: Why a method was left out.
    continual: Continual | None = None
    chunks: dict[str, str] = field(default_factory=dict)  #: How each method takes its batch, where that was asked for.

    @cached_property
    def report(self) -> Report:
        """The report, which is printed or written."""
        from analysis.reports.report import Report
        from analysis.steps.nets import SUM_OF_OUTPUTS, remark

        step, shape, settings = self.step, self.step.input_shape, self.asked.settings
        lost = ""
        if getattr(step.net, "batch_statistics", False):  # only a net from a file needs the reader of such files
            from analysis.onnx.telling import lost_statistics

            lost = lost_statistics(step.net, self.bills)
        return Report.of(
            self.bills,
            self.asked.convention,
            net=step.name,
            batch=step.batch,
            image_size=shape[1] if len(shape) == 3 and shape[1] == shape[2] else None,
            num_classes=step.num_classes,
            dtype=step.dtype,
            tuned_layers=step.tuned_layers,
            ranks_from=self.choice.source if self.choice else "not needed: no method compresses",
            calibration=self.calibration,
            settings={
                name: settings.of(METHODS[name].names)
                | {fact: value for fact, value in self.steps[name].facts.items() if fact not in HIDDEN_FACTS}
                for name in self.bills
            },
            notes=self.notes,
            continual=self.continual,
            peaks_of=lambda: self.peaks,
            net_parameters=sum(parameter.size for parameter in step.net.parameters()),
            optimizer=self.asked.optimizer,
            remark="; ".join(filter(None, ["" if step.num_classes else SUM_OF_OUTPUTS, remark(step.net), lost])),
            file_only=bool(lost) or bool(getattr(step.net, "file_only", False)),
            chunks=self.chunks,
        )

    @cached_property
    def peaks(self) -> dict[str, Peak]:
        """The peak of memory of one step, by method."""
        from analysis.reports.peaks import peaks

        return peaks(self.step, {name: self.steps[name] for name in self.bills}, self.asked.optimizer)


def predict_step(
    step: TracedStep, names: Sequence[str], asked: Asked, continual: Continual | None = None
) -> Prediction:
    """The prediction for a step that was traced, by methods of these names."""
    from analysis.ranks.choose import choose_ranks
    from analysis.rules.account import CostCache, account

    tuned, choice = {}, None
    if any(METHODS[name].make is not None for name in names):
        tuned = tuned_inputs(step)
    if any(METHODS[name].ranks is not None for name in names):
        choice = choose_ranks(tuned, step.name, step.input_shape, asked.epsilon, asked.ranks, asked.spectra)
    cache, steps, given, bills, notes, chunks = CostCache(), {}, {}, {}, {}, {}
    for name in names:
        try:
            given[name] = ranks_of(name, choice, tuned)
            steps[name] = method_step(name, step, asked.settings, given[name], tuned)
        except NotApplicableError as error:
            if list(names) != list(METHODS):
                raise ValueError(f"method {name!r} does not fit net {step.name!r}: {error}") from None
            notes[name] = str(error)
            given.pop(name, None)
            continue
        if asked.chunk is not None:
            from analysis.steps.chunks import in_chunks

            whole = steps[name]
            steps[name], chunks[name] = in_chunks(name, step, whole, asked.settings, given[name], tuned, asked.chunk)
        of_step = steps[name]
        bills[name] = account(of_step.records, step.head, of_step.repeats, None if of_step.own_trace else cache)
    calibration = _calibrations(step, bills, given, tuned, asked.settings, cache)
    return Prediction(asked, step, choice, bills, given, steps, calibration, notes, continual, chunks)


def ranks_of(name: str, choice: RankChoice | None, tuned: Shapes) -> Ranks:
    """The ranks of a method, by layer; none for a method without ranks."""
    from analysis.ranks.choose import mean_free

    kind = METHODS[name].ranks
    if kind is None or choice is None:
        return {}
    if kind == "given":
        return dict(choice.ranks)
    try:
        return mean_free(choice.ranks, tuned)
    except ValueError as error:
        raise NotApplicableError(str(error)) from None


def _calibrations(
    step: TracedStep,
    bills: dict[str, list[Billed]],
    given: dict[str, Ranks],
    tuned: Shapes,
    settings: Settings,
    cache: CostCache,
) -> dict[str, CalibrationCost]:
    """The calibration of each method that has one, and what a step saves compared with a HOSVD at the same ranks."""
    from analysis.rules.account import account
    from analysis.rules.calibration_costs import calibration_cost, saved_per_step
    from analysis.rules.recompute import flatten

    costs = {}
    for name in bills:
        kind = METHODS[name].calibration
        if kind is None:
            continue
        if "hosvd" in bills and given["hosvd"] == given[name]:
            hosvd = bills["hosvd"]
        else:
            records = method_step("hosvd", step, settings, given[name], tuned).records
            hosvd = account(records, step.head, cache=cache)
        saved = saved_per_step(bills[name], hosvd)
        forward = sum(bill.cost.forward_macs for bill in bills[name])
        costs[name] = calibration_cost(
            flatten(step.records), forward, given[name], settings.calibration_batches, kind, saved
        )
    return costs


def tuned_inputs(step: TracedStep) -> dict[str, tuple[int, ...]]:
    """Input shape of every tuned layer that is called, batch first."""
    from analysis.rules.account import WEIGHTED
    from analysis.rules.recompute import flatten

    shapes: dict[str, tuple[int, ...]] = {}
    for record in flatten(step.records):
        if record.path in step.tuned_layers and record.op in WEIGHTED:
            shape = record.inputs[0].shape
            if shapes.setdefault(record.path, shape) != shape:
                raise ValueError(
                    f"layer {record.path!r} is called with inputs of shapes {shapes[record.path]} and {shape}, "
                    "LANCE's factors fit one shape"
                )
    return shapes
