"""One network of the corpus: its step predicted from shapes, the same step run for real, and its exports as ONNX."""

from __future__ import annotations

import copy
import time
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from analysis.check.torch_measure import Totals, real_totals
from analysis.commands.names import one_line
from analysis.torch_modules.inputs import Asked, read_specs
from analysis.torch_modules.own_tape import real_step, with_tape
from analysis.torch_modules.run import Run, watched_step
from experiments.corpus.networks import Network

TIMED_BATCH = 128
FAILURES = (
    ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError, RuntimeError, TypeError,
    ValueError,
)  # fmt: skip
"""What code of other packages raises; an interruption is none of them."""


@dataclass(frozen=True)
class Export:
    """What became of an export: why it was refused, or its accounts beside those of the module.

    Attributes
    ----------
    refused : str
        Why there is no file, or no account of it; empty for one that was accepted.
    predicted, module : Totals, optional
        Of the file, and of the module with what such a file trains (:func:`as_a_file_trains`).
    marked : bool
        Whether the report says beside PyTorch's column that it is that of the file alone.
    """

    refused: str = ""
    predicted: Totals | None = None
    module: Totals | None = None
    marked: bool = False

    def __str__(self) -> str:
        if self.predicted is None or self.module is None:
            return f"no: {self.refused}"
        off = [
            f"{name} {(ours / theirs - 1) * 100:+.2f} %"
            for name, ours, theirs in zip(("bytes", "forward", "backward"), self.predicted, self.module, strict=True)
            if ours != theirs
        ]
        return ", ".join(off or ["exact"]) + (", marked" if self.marked else "")


@dataclass(frozen=True)
class Tape:
    """What this library's tape keeps of a step: predicted and measured, or why there is none."""

    predicted: int | None = None
    measured: int | None = None
    none: str = ""

    @property
    def agrees(self) -> bool:
        """Whether nothing wrong is printed: both are equal, or there is no number."""
        return self.predicted == self.measured

    def __str__(self) -> str:
        if self.predicted is None:
            return f"none: {self.none}"
        same = "measured equal" if self.agrees else f"measured {self.measured:,}"
        return f"{self.predicted:,}, {same}"


@dataclass(frozen=True)
class Outcome:
    """A network, predicted and run."""

    package: str
    name: str
    batch: int
    inputs: tuple[str, ...]
    parameters: int = 0
    predicted: Totals | None = None
    real: Totals | None = None
    seconds: float = 0.0  #: Of processor time, for the prediction at :data:`TIMED_BATCH`.
    uncounted: tuple[str, ...] = ()
    failed: str = ""
    exports: dict[str, Export] | None = None
    tape: Tape | None = None  #: Where it was asked for.

    @property
    def is_exact(self) -> bool:
        """Whether bytes and FLOPs, forward and backward, are all equal, and the tape if it was asked for."""
        return self.predicted is not None and self.predicted == self.real and (self.tape is None or self.tape.agrees)

    def to_json(self) -> dict[str, Any]:
        totals = {
            name: None if of is None else of._asdict()
            for name, of in (("predicted", self.predicted), ("real", self.real))
        }
        return {**asdict(self), **totals, "exact": self.is_exact}


def compare(network: Network, with_exports: bool = False, tape: bool = False) -> Outcome:
    """Predict a network, run it, and, where that is asked for, export it in both ways and predict the files.

    With ``tape`` it runs by this library's operations as well, and their tape is measured.
    """
    about = (network.package, network.name, network.batch, network.inputs)
    specs = read_specs(list(network.inputs), None)
    how = Run(Asked.of(network.batch, specs, None, network.batch))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = network.build()
            step = watched_step(module, network.name, how)
            real = real_totals(module, network.name, how)
            start = time.process_time()
            watched_step(module, network.name, Run(Asked.of(TIMED_BATCH, specs, None, TIMED_BATCH)))
            seconds = time.process_time() - start
            tried = with_exports and network.exports
            exports = {kind: export(module, how, kind) for kind in ("documented", "plain")} if tried else None
            own = compare_tape(module, network.name, how) if tape else None
    except FAILURES as error:
        return Outcome(*about, failed=one_line(error)[:200])
    return Outcome(*about, step.parameters, Totals.of(step), real, seconds, step.uncounted, "", exports, own)


def compare_tape(module: Any, name: str, how: Run) -> Tape:
    """A step by this library's operations: what its tape keeps, predicted and measured."""
    from lance_ref import tape

    step = with_tape(watched_step(module, name, how), module, name, how)
    if step.tape is None:
        return Tape(none=step.no_tape)
    predicted = sum(storage.nbytes for storage in step.tape)
    return Tape(predicted, tape(real_step(module, name, how).loss).total_bytes)


def export(module: Any, how: Run, kind: str) -> Export:
    """The file of an export, predicted, beside the module with what such a file trains.

    ``kind`` is "documented", as the pages say, or "plain", which is what everybody writes. Inputs with names are given
    in their order, and a network that returns a mapping returns its logits.
    """
    own = positional(as_a_file_trains(module), [spec.name for spec in how.inputs.specs])
    how = replace(how, inputs=replace(how.inputs, specs=tuple(spec._replace(name=None) for spec in how.inputs.specs)))
    with TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        try:
            write(own, how, kind, path)
        except FAILURES as error:
            return Export(f"torch.onnx.export: {one_line(error)[:100]}")
        return compare_file(path, own, how)


def write(own: Any, how: Run, kind: str, path: Path) -> None:
    """Export a module as ONNX; whatever the exporter raises goes on."""
    import torch

    options: dict[str, Any] = {"dynamo": False}
    if kind == "documented":
        options |= {"training": torch.onnx.TrainingMode.TRAINING, "do_constant_folding": False}
    module = copy.deepcopy(own)  # an export puts all parts of a module into one mode
    module.train(kind == "documented")
    torch.onnx.export(module, how.inputs.tensors(own).args, str(path), **options)


def compare_file(path: Path, own: Any, how: Run) -> Export:
    """The account of a file beside that of the module."""
    from analysis.reports.predict import predict

    shape = how.inputs.specs[0].shape
    try:
        report = predict(str(path), how.inputs.batch, input_shape=shape, tune="all", methods="bp").report
    except FAILURES as error:
        return Export(one_line(error).replace(str(path), "the file")[:200])
    found = report.totals["bp"]
    forward = found.flops["forward"]
    ours = Totals(found.activation_bytes["pytorch"], forward, found.flops["total"] - forward)
    step = watched_step(own, "net", how)
    theirs = Totals.of(step)
    again = 2 * step.total_macs("recompute")  # by PyTorch's attention, of which the report's remark speaks
    return Export("", ours, theirs._replace(backward_flops=theirs.backward_flops - again), report.file_only)


def positional(module: Any, names: Sequence[str | None]) -> Any:
    """The module, or one around it that takes named inputs in this order, and gives logits in place of a mapping."""
    import torch

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = module

        def forward(self, *inputs: Any) -> Any:
            found = self.net(**{str(name): x for name, x in zip(names, inputs, strict=True)})
            return found["logits"] if "logits" in found else found[0]

    return module if not any(names) else Positional().train(module.training)


def as_a_file_trains(module: Any) -> Any:
    """A copy that trains as a file with all layers tuned: weights of layers, and nothing that belongs to none.

    Batch norms keep to their statistics. Scales, tables and tokens of a network's own do not train.
    """
    import torch

    own = copy.deepcopy(module)
    layers = (torch.nn.modules.conv._ConvNd, torch.nn.Linear, torch.nn.MultiheadAttention, torch.nn.RNNBase)
    own.requires_grad_(False)
    for part in own.modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
            part.eval()
        elif isinstance(part, layers) or type(part).__name__ == "Conv1D":  # the linear layer of GPT-2
            for parameter in part.parameters(recurse=False):
                parameter.requires_grad_(True)
    return own
