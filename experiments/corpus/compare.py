"""One network of the corpus: its step predicted from shapes, the same step run for real, and its exports as ONNX."""

from __future__ import annotations

import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from analysis.check.torch_measure import Totals, real_totals
from analysis.commands.cli import one_line
from analysis.torch_modules.inputs import Asked, read_specs
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
    """What became of an export: why it was refused, or whether FLOPs and bytes are those of the module."""

    refused: str = ""
    flops_equal: bool | None = None
    bytes_equal: bool | None = None

    def __str__(self) -> str:
        if self.refused:
            return f"no: {self.refused}"
        told = {(True, True): "exact", (True, False): "FLOPs exact, bytes off", (False, True): "bytes exact, FLOPs off"}
        return told.get((bool(self.flops_equal), bool(self.bytes_equal)), "both off")


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

    @property
    def is_exact(self) -> bool:
        """Whether bytes and FLOPs, forward and backward, are all equal."""
        return self.predicted is not None and self.predicted == self.real

    def to_json(self) -> dict[str, Any]:
        totals = {
            name: None if of is None else of._asdict()
            for name, of in (("predicted", self.predicted), ("real", self.real))
        }
        return {**asdict(self), **totals, "exact": self.is_exact}


def compare(network: Network, with_exports: bool = False) -> Outcome:
    """Predict a network, run it, and, where that is asked for, export it in both ways and predict the files."""
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
    except FAILURES as error:
        return Outcome(*about, failed=one_line(error)[:200])
    return Outcome(*about, step.parameters, Totals.of(step), real, seconds, step.uncounted, "", exports)


def export(module: Any, how: Run, kind: str) -> Export:
    """The file of an export, predicted, beside the module as such a file shows it: batch norm with its statistics.

    ``kind`` is "documented", as the pages say, or "plain", which is what everybody writes.
    """
    import torch

    from analysis.reports.predict import predict

    options: dict[str, Any] = {"dynamo": False}
    if kind == "documented":
        options |= {"training": torch.onnx.TrainingMode.TRAINING, "do_constant_folding": False}
    own = with_statistics(module)
    inputs = how.inputs.tensors(own)
    if inputs.kwargs:
        return Export("inputs by name, of which an exported network has none")
    with TemporaryDirectory() as folder:
        path = Path(folder) / "net.onnx"
        try:
            torch.onnx.export(own if kind == "documented" else own.eval(), inputs.args, str(path), **options)
        except FAILURES as error:
            return Export(f"torch.onnx.export: {one_line(error)[:100]}")
        try:
            prediction = predict(str(path), how.inputs.batch, tune="all", methods="bp")
        except FAILURES as error:
            return Export(one_line(error).replace(str(path), "the file")[:120])
    found = prediction.report.totals["bp"]
    theirs = Totals.of(watched_step(with_statistics(module), "net", how))
    flops = theirs.forward_flops + theirs.backward_flops
    return Export("", found.flops["total"] == flops, found.activation_bytes["pytorch"] == theirs.kept_bytes)


def with_statistics(module: Any) -> Any:
    """A copy whose batch norms keep to their statistics and do not train, as networks of this library are tuned."""
    import copy

    import torch

    own = copy.deepcopy(module)
    for part in own.modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm):
            part.eval().requires_grad_(False)
    return own
