"""Whole training steps, timed side by side, and the memory of the process: ``python -m benchmarks.steps``.

Forward, backward and update (SGD) of our backpropagation, of LANCE, and of the same net in PyTorch, eager
backpropagation, where it is installed; all from the same weights, with the same layers trained and the same norms
frozen. PyTorch is there three times: as it is; with frozen norms folded into their convolutions and channels innermost
("folded"); and that compiled ("compiled"), where ``torch.compile`` works. LANCE's ranks are those of the cost model:
from measured spectra at an energy threshold of 0.7 where they are shipped, else a quarter of each mode.

Each side then runs in a process of its own, and what that holds in memory at most is compared: whether LANCE's peak
lies below backpropagation's by as much as the tapes differ. The cost model says where in the step the peak is. Where
the first stages are frozen, it is in them; their output can be made once, a few images at a time
(:mod:`lance_ref.train.features`), and the memory of our two sides is compared once more in steps on such features.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from analysis.commands.command_line import run_main
from analysis.peak.memory import make_optimizer
from analysis.reports.predict import predict
from analysis.reports.prediction import Prediction
from analysis.steps.runs import running
from benchmarks.resident import Resident, in_own_process, measurable, peak_of
from benchmarks.side_by_side import Side, Table, Target, Timing, number, parser, peer, pinned, run, span, timed
from lance_ref import F, no_grad
from lance_ref.nn import Module
from lance_ref.train.features import Part, frozen_stages, stages_of, tail

IN_PYTORCH = ("pytorch", "folded", "compiled")
SIDES = ("bp", "lance", *IN_PYTORCH)
WITH_MEMORY = ("bp", "lance", "pytorch")
"""Sides whose memory is measured, each in a process of its own."""
CLASSES = 10
AT_A_TIME = 2
"""Images that the frozen stages are run on together where their output is made beforehand."""
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """A net, the layers that train, and the batch.

    Attributes
    ----------
    net : str
        Of ``lance_ref.models``.
    batch : int
    tune : str
        As for :func:`lance_ref.tune`.
    image_size : int, optional
        By default what suits the net.
    limit : float
        The most that a LANCE step may take of PyTorch's time.
    """

    net: str
    batch: int
    tune: str = "all"
    image_size: int | None = None
    limit: float = 1.0

    def predict(self, *methods: str) -> Prediction:
        """The net with weights, what these methods run, and what they should take."""
        return predict(
            self.net,
            self.batch,
            self.image_size,
            num_classes=CLASSES,
            tune=self.tune,
            methods=methods,
            with_weights=True,
        )


CASES = {
    case.net: case
    for case in (
        Case("mobilenetv2", 32, "last:4", 224, limit=0.75),
        Case("mcunet", 128, "last:4", 128, limit=0.75),
        Case("alexnet-cl", 64),
        Case("mlp", 10),
    )
}


# ---- the sides ---------------------------------------------------------------------------


@contextmanager
def side(name: str, case: Case, on_features: bool = False) -> Iterator[Side]:
    """One side's step, while the ``with`` block lasts: PyTorch's, or that of a method of the cost model.

    Ours takes images, or with ``on_features`` what the frozen first stages make of them.
    """
    prediction = case.predict("bp" if name in IN_PYTORCH else name)
    step = prediction.step
    rng = np.random.default_rng(0)
    images = rng.standard_normal((step.batch, *step.input_shape), dtype=np.float32)
    labels = rng.integers(0, CLASSES, step.batch)
    if name in IN_PYTORCH:
        yield pytorch_step(case.net, prediction, images, labels, name)
        return
    with running(step, name, prediction.steps[name]):
        optimizer = make_optimizer("sgd", step.net)
        inputs, net = features_of(step.net, images) if on_features else (images, step.net)

        def our_step() -> None:
            optimizer.zero_grad()
            F.cross_entropy(net(inputs), labels).backward()
            optimizer.step()

        yield our_step


def features_of(net: Module, images: np.ndarray) -> tuple[np.ndarray, Module]:
    """What the frozen first stages make of the images, a few at a time, and the net that goes on from there."""
    stage, why = frozen_stages(net)
    if not stage:
        raise ValueError(f"there is no frozen part to run once: {why}")
    body, parts = Part(net, stages_of(net)[:stage]), range(0, len(images), AT_A_TIME)
    with no_grad():
        features = np.concatenate([body(images[start : start + AT_A_TIME]).data for start in parts])
    return features, tail(net, stage)


def pytorch_step(
    net: str, prediction: Prediction, images: np.ndarray, labels: np.ndarray, variant: str = "pytorch"
) -> Side:
    """The same step in PyTorch, in one of the variants :data:`IN_PYTORCH`."""
    import torch

    from benchmarks.torch_nets import folded, twin

    theirs: Any = twin(net, prediction.step.net, CLASSES)
    if variant != "pytorch":
        theirs = folded(theirs)
    if variant == "compiled":
        theirs = torch.compile(theirs)
    optimizer = torch.optim.SGD([p for p in theirs.parameters() if p.requires_grad], lr=1e-6)
    x, y = torch.from_numpy(images), torch.from_numpy(labels)
    if variant != "pytorch" and x.ndim == 4:
        x = x.contiguous(memory_format=torch.channels_last)

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(theirs(x), y).backward()
        optimizer.step()

    return step


def available(wanted: Sequence[str]) -> list[str]:
    """The sides whose library is installed."""
    return [name for name in wanted if name not in IN_PYTORCH or peer("torch") is not None]


def times(case: Case, wanted: Sequence[str], repeats: int) -> dict[str, Timing]:
    """Seconds of a step of each side, in turn."""
    with ExitStack() as stack:
        sides = {name: stack.enter_context(side(name, case)) for name in available(wanted)}
        if "compiled" in sides and not works(sides["compiled"]):
            del sides["compiled"]
        return timed(sides, repeats)


def works(compiled: Side) -> bool:
    """Whether a compiled step runs; if not, one line says why."""
    try:
        compiled()
    except Exception as error:  # whatever a compiler that is missing or fails may raise
        why = str(error).strip().partition("\n")[0]
        print(f"torch.compile does not work here: skipped ({type(error).__name__}: {why})", flush=True)
        return False
    return True


def peak(name: str, case: Case, threads: int, on_features: bool = False) -> Resident:
    """What this process holds at most during a step of that side."""
    with pinned(threads, ("torch",) if name in IN_PYTORCH else ()), side(name, case, on_features) as step:
        return peak_of(step)


def has_frozen_part(case: Case) -> bool:
    """Whether the first stages of the net can be run once for all."""
    return frozen_stages(case.predict("bp").step.net)[0] > 0


# ---- the figures -------------------------------------------------------------------------


def measure_case(case: Case, options: argparse.Namespace) -> dict[str, Any]:
    """One net, as it is written."""
    timings = times(case, options.sides, options.repeats)
    medians = {name: timing.median for name, timing in timings.items()}
    pairs = (("lance", "bp"), *(("lance", name) for name in IN_PYTORCH), ("bp", "pytorch"))
    resident: dict[str, dict[str, int]] | None = None
    on_features: dict[str, dict[str, int]] | None = None
    if options.memory and measurable():
        measured = [name for name in timings if name in WITH_MEMORY]
        resident = {name: in_own_process(peak, name, case, options.threads)._asdict() for name in measured}
        if has_frozen_part(case):
            ours = [name for name in timings if name not in IN_PYTORCH]
            on_features = {name: in_own_process(peak, name, case, options.threads, True)._asdict() for name in ours}
    return {
        "net": case.net,
        "batch": case.batch,
        "tune": case.tune,
        "seconds": {name: timing.as_json() for name, timing in timings.items()},
        "ratios": {f"{a}/{b}": medians[a] / medians[b] for a, b in pairs if {a, b} <= set(medians)},
        "resident": resident,
        "resident_on_features": on_features,
        **predicted(case),
    }


def predicted(case: Case) -> dict[str, Any]:
    """What the cost model says of the memory of our two sides, and where LANCE's ranks are from."""
    report = case.predict("bp", "lance").report
    memory = {
        name: {
            "tape_bytes": report.totals[name].activation_bytes["tape"],
            "factor_bytes": report.totals[name].subspace_bytes,
            "peak_bytes": of_step.peak_bytes,
            "peak_at": f"{of_step.moment}, {of_step.at}",
        }
        for name, of_step in report.peaks.items()
    }
    return {"ranks_from": report.ranks_from, "predicted": memory}


def targets(rows: Sequence[dict[str, Any]]) -> list[Target]:
    """What was aimed at, for the rows that there are."""
    found = []
    for row in rows:
        limits = {"lance/bp": 1.0, "lance/pytorch": CASES[row["net"]].limit}
        found += [
            Target(f"time of a step, {name}, {row['net']}", row["ratios"][name], limit)
            for name, limit in limits.items()
            if name in row["ratios"]
        ]
        bp, lance = (row["predicted"][name]["tape_bytes"] for name in ("bp", "lance"))
        for of, where in (("resident", ""), ("resident_on_features", " on features")):
            lower = lower_by(row[of])
            if lower is not None:
                what = f"MiB by which LANCE's peak is lower, {row['net']}{where}; the limit: by which its tape is"
                found.append(Target(what, lower / MIB, (bp - lance) / MIB, at_least=True))
    return found


def lower_by(resident: dict[str, dict[str, int]] | None) -> int | None:
    """Bytes by which LANCE's resident peak is below backpropagation's; None if they were not measured."""
    if resident is None or not {"bp", "lance"} <= set(resident):
        return None
    return resident["bp"]["peak"] - resident["lance"]["peak"]


# ---- what is printed ---------------------------------------------------------------------


def show(row: dict[str, Any], table: Table) -> None:
    """The rows of one net, and beneath them what is to be known of its memory."""
    seconds, resident = row["seconds"], row["resident"] or {}
    for name, of in seconds.items():
        held = resident.get(name)
        table.row(
            row["net"],
            name,
            number(1e3 * of["median"]),
            *(number(of["median"] / seconds[x]["median"] if x in seconds else None) for x in ("bp", "pytorch")),
            span(of),
            number(held and held["peak"] / MIB),
            number(held and (held["peak"] - held["before"]) / MIB),
        )
    stronger = {name: row["ratios"][f"lance/{name}"] for name in IN_PYTORCH[1:] if f"lance/{name}" in row["ratios"]}
    if stronger:
        told = (f"{ratio:.2f} of {name}{' (which wins)' if ratio > 1 else ''}" for name, ratio in stronger.items())
        print(f"    LANCE beside stronger peers: {', '.join(told)}")
    for name, of in row["predicted"].items():
        tape, factors, peak = (f"{of[what] / MIB:.2f}" for what in ("tape_bytes", "factor_bytes", "peak_bytes"))
        print(f"    {name}, predicted MiB: tape {tape}, factors {factors}, peak {peak} in {of['peak_at']}")
    if row["resident_on_features"]:
        listed = ", ".join(
            f"{name} {of['peak'] / MIB:.1f} ({(of['peak'] - of['before']) / MIB:.1f} in the step)"
            for name, of in row["resident_on_features"].items()
        )
        print(f"    on features of the frozen stages, peak MiB: {listed}")
    print(f"    ranks: {row['ranks_from']}", flush=True)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    cases = [CASES[name] for name in options.nets]
    if options.quick:
        cases = [replace(case, batch=2, image_size=case.image_size and 32) for case in cases]
    if options.memory and not measurable():
        print("this system does not say what a process holds: memory skipped")
    print("a step: milliseconds (median), ratios; the process: most MiB held, and how many of them in the step alone")
    table = Table("net", "side", "ms", "/ bp", "/ pytorch", "min-max", "peak MiB", "in the step", first=12, width=10)
    rows = []
    for case in cases:
        rows.append(measure_case(case, options))
        show(rows[-1], table)
    return {"rows": rows, "targets": targets(rows)}


def main(arguments: Sequence[str] | None = None) -> int:
    p = parser("benchmarks.steps", __doc__, repeats=5)
    p.add_argument("--nets", nargs="+", choices=list(CASES), default=list(CASES), help="all by default")
    p.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="all by default")
    p.add_argument("--no-memory", dest="memory", action="store_false", help="times alone")
    return run(p, arguments, measure, peers=("torch",))


if __name__ == "__main__":
    sys.exit(run_main(main))
