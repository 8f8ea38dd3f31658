"""Checks of claims that need fine-tuning: they read committed result files, and judge what stands there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from statistics import fmean
from typing import Any

from experiments.ledger.evidence import (
    Evidence,
    MissingEvidenceError,
    Outcome,
    check,
    graded,
    row_of,
    verdict_of_points,
)
from experiments.ledger.explain import figures_of

FINETUNE = "finetune_cifar10"
SWEEP_COMMAND = "python -m experiments.finetune.sweep --data {0} --output experiments/results/sweep_{0}.json"


def _method(evidence: Evidence, name: str, recipe: str = "papers") -> dict[str, Any]:
    """A method's row of the fine-tuning experiment."""
    rows = evidence.results(FINETUNE, "python -m experiments.finetune")["rows"]
    return row_of(rows, f"python -m experiments.finetune --recipe {recipe}", "--methods", method=name, recipe=recipe)


def _accuracy(row: Mapping[str, Any]) -> str:
    spread = "" if row["accuracy_sd"] is None else f" ± {100 * row['accuracy_sd']:.1f}"
    return f"{100 * row['accuracy_mean']:.1f}{spread} %"


def _mean(row: Mapping[str, Any], of: str, when: str) -> float:
    """Mean over seeds and layers, at the start, middle or end of training."""
    values = [value for seed in row["seeds"] for value in seed[of][when].values()]
    return fmean(values)


# ---- fine-tuning -----------------------------------------------------------------------------


@check
def accuracy_near_bp(evidence: Evidence) -> Outcome:
    """LANCE at the papers' threshold beside bp and the head alone."""
    bp, lance, head = (_method(evidence, name) for name in ("bp", "lance", "head-only"))
    best = _method(evidence, "lance-planned")
    points = 100 * (bp["accuracy_mean"] - lance["accuracy_mean"])
    verdict = verdict_of_points(points)
    return Outcome(
        f"bp {_accuracy(bp)}, LANCE at ε = 0.7 {_accuracy(lance)}, head alone {_accuracy(head)}; "
        f"planned and mean-free {_accuracy(best)}",
        verdict,
        f"{points:.1f} points below, {100 * (lance['accuracy_mean'] - head['accuracy_mean']):.1f} above the head alone",
    )


@check
def saved_in_finetuning(evidence: Evidence) -> Outcome:
    """Bytes of the tape and of the factors beside bp's tape."""
    bp, lance = (_method(evidence, name)["seeds"][0] for name in ("bp", "lance"))
    with_factors = lance["tape_bytes"] + lance["factor_bytes"]
    saved = 1 - with_factors / bp["tape_bytes"]
    in_pytorch = figures_of("mcunet", 128, "last:4", 10, ranks="0.25")["bp"]
    most = in_pytorch.paper / in_pytorch.pytorch
    return Outcome(
        f"{100 * saved:.1f} % of our tape with factors, {bp['tape_bytes'] / 1024:,.0f} -> "
        f"{with_factors / 1024:,.0f} KiB; in PyTorch at most {100 * most:.0f} %",
        graded(min(saved, most) >= 0.7, max(saved, most) >= 0.7),
        "MCUNet, last 4: beyond the inputs of the tuned layers there is nothing that the method could save",
    )


@check
def asi_memory(evidence: Evidence) -> Outcome:
    """What ASI keeps of the tuned layers' inputs, and its whole tape."""
    bp, asi = (_method(evidence, name)["seeds"][0] for name in ("bp", "asi"))
    stores, tape = bp["paper_bytes"] / asi["paper_bytes"], bp["tape_bytes"] / asi["tape_bytes"]
    return Outcome(
        f"{stores:.0f}x of the papers' count, {tape:.0f}x of the tape (MCUNet, budget of 200 KiB)",
        "reproduced" if tape >= 120 else "bounded",
        "the factor follows from the budget that one sets; of the whole tape it is less",
    )


@check
def asi_same_setting(evidence: Evidence) -> Outcome:
    """ASI and LANCE on the same weights and batches, within one budget."""
    rows = {name: _method(evidence, name) for name in ("lance", "lance-uniform", "asi")}
    parts = [
        f"{name} {_accuracy(row)} in {row['seeds'][0]['paper_bytes'] / 1024:.0f} KiB" for name, row in rows.items()
    ]
    asi, lance = rows["asi"], rows["lance-uniform"]
    apart = abs(asi["accuracy_mean"] - lance["accuracy_mean"]) > 2 * math.hypot(
        asi["accuracy_sd"], lance["accuracy_sd"]
    )
    extra = [sum(row["seeds"][0]["macs"][kind] for kind in ("projection", "decomposition")) for row in (asi, lance)]
    worse = apart and asi["accuracy_mean"] > lance["accuracy_mean"]
    return Outcome(
        f"{'; '.join(parts)}; finding directions and projecting {extra[0] / extra[1]:.1f}x LANCE's multiply-adds",
        "contradicted" if worse else "reproduced",
        f"same weights, batches, layers, rate; in one budget they are {'apart' if apart else 'within two deviations'}",
    )


@check
def spread_over_seeds(evidence: Evidence) -> Outcome:
    """The largest standard deviation of any method."""
    rows = evidence.results(FINETUNE, "python -m experiments.finetune")["rows"]
    papers = [row for row in rows if row["recipe"] == "papers"]
    seeds = {len(row["seeds"]) for row in papers}
    widest = max(papers, key=lambda row: row["accuracy_sd"])
    return Outcome(
        f"{len(papers)} methods, {min(seeds)} seeds each: standard deviation at most "
        f"{100 * widest['accuracy_sd']:.1f} points ({widest['method']})",
        "reproduced" if min(seeds) >= 3 and widest["accuracy_sd"] < 0.02 else "bounded",
        f"a difference of {200 * math.sqrt(2) * widest['accuracy_sd']:.1f} points between two methods is beyond it",
    )


@check
def energy_kept(evidence: Evidence) -> Outcome:
    """The energy that fixed directions keep, at the start and at the end."""
    lance, hosvd = _method(evidence, "lance"), _method(evidence, "hosvd")
    start, end = (_mean(lance, "energy_kept", when) for when in ("start", "end"))
    fresh = _mean(hosvd, "energy_kept", "end")
    lost = 1 - end / start
    return Outcome(
        f"{start:.2f} of the energy at the start, {end:.2f} at the end; directions found anew keep {fresh:.2f}",
        graded(lost < 0.05, lost < 0.3),
        f"{100 * lost:.0f} % of it is lost in training: the layers that train move the inputs of those above",
    )


@check
def drift(evidence: Evidence) -> Outcome:
    """The layer whose fixed directions lose most."""
    history = evidence.results("adapt_eurosat", "python -m experiments.adapt --data eurosat")["history"]
    first, last = history[0]["energy_kept"], history[-1]["energy_kept"]
    change = {layer: last[layer] / first[layer] - 1 for layer in first}
    layer = min(change, key=lambda name: change[name])
    return Outcome(
        f"{layer}: {first[layer]:.2f} -> {last[layer]:.2f} in {len(history)} steps; mean of {len(change)} layers "
        f"{fmean(first.values()):.2f} -> {fmean(last.values()):.2f}",
        graded(min(change.values()) > -0.05, min(change.values()) > -0.5),
        f"{layer} loses {-100 * change[layer]:.0f} % of what it kept; lance_ref.lance.recalibration watches that",
    )


@check
def fidelity(evidence: Evidence) -> Outcome:
    """Cosine with the exact gradient against bytes."""
    names = ("lance", "lance-uniform@50", "lance-uniform")
    points = []
    for name in names:
        row = _method(evidence, name)
        points.append((row["seeds"][0]["paper_bytes"] / 1024, _mean(row, "cosines", "end")))
    rising = all(a[1] < b[1] for a, b in pairwise(points))
    return Outcome(
        "cosine with the exact gradient, end of training: " + ", ".join(f"{c:.2f} in {k:.0f} KiB" for k, c in points),
        graded(rising),
        "more bytes, nearer to the gradient; how near says little of the accuracy (angle-70)",
    )


@check
def angle(evidence: Evidence) -> Outcome:
    """What an angle says of learning: two methods, their angles and accuracies."""
    lance, best = _method(evidence, "lance"), _method(evidence, "lance-planned")
    cosines = [_mean(row, "cosines", "end") for row in (lance, best)]
    degrees = [math.degrees(math.acos(value)) for value in cosines]
    misleads = degrees[1] > degrees[0] and best["accuracy_mean"] > lance["accuracy_mean"]
    return Outcome(
        f"cos 70° = {math.cos(math.radians(70)):.2f}: a third of the first-order progress; LANCE {degrees[0]:.0f}° and "
        f"{_accuracy(lance)}, mean-free {degrees[1]:.0f}° and {_accuracy(best)}",
        "contradicted" if misleads else "bounded",
        "below 90° a small step lowers the loss, and no more follows: "
        f"the worse angle {'learns better' if misleads else 'does not learn better'} here",
    )


@check
def accuracy_tuned(evidence: Evidence) -> Outcome:
    """The same comparison, each method at its own best learning rate."""
    bp, lance, best = (_method(evidence, name, "tuned") for name in ("bp", "lance", "lance-planned"))
    points = 100 * (bp["accuracy_mean"] - lance["accuracy_mean"])
    return Outcome(
        ", ".join(f"{row['method']} {_accuracy(row)} at lr {row['lr']:g}" for row in (bp, lance, best)),
        verdict_of_points(points),
        f"each at its own best learning rate: {points:.1f} points below, planned and mean-free "
        f"{100 * (bp['accuracy_mean'] - best['accuracy_mean']):.1f}",
    )


# ---- sweeps of thresholds, modes and budgets ----------------------------------------------------


def _points(evidence: Evidence, data: str, batch: int) -> dict[str, dict[str, Any]]:
    """Settings of a sweep at one batch size, by label."""
    command = SWEEP_COMMAND.format(data)
    points = evidence.results(f"sweep_{data}", command)["points"]
    found = {point["label"]: point for point in points if point["batch"] == batch}
    if not found:
        raise MissingEvidenceError(f"needs {command} --batch {batch}")
    return found


def _bytes(point: Mapping[str, Any]) -> int:
    return int(point["tape_bytes"] + point["factor_bytes"])


def _beside(lost: float) -> str:
    return f"{abs(lost):.1f} points {'above' if lost < 0 else 'below'}"


def _shown(point: Mapping[str, Any]) -> str:
    return f"{100 * point['accuracy']:.1f} % in {_bytes(point) / 1024:,.0f} KiB"


@check
def batch_mode_sweep(evidence: Evidence) -> Outcome:
    """Whether compressing the batch mode reaches the same accuracy in no more bytes (half a point allowed)."""
    points = _points(evidence, "cifar10", 128)
    families = [
        [point for label, point in points.items() if point["family"] == "uniform threshold" and label.startswith(modes)]
        for modes in ("all modes", "no batch")
    ]
    compressed, left = families
    matched = sum(
        any(_bytes(a) <= _bytes(b) and a["accuracy"] >= b["accuracy"] - 0.005 for a in compressed) for b in left
    )
    best = [max(family, key=lambda point: point["accuracy"]) for family in families]
    return Outcome(
        f"best of all modes {_shown(best[0])}; of all but batch {_shown(best[1])}",
        graded(matched == len(left), matched),
        f"for {matched} of {len(left)} thresholds without it, with it there is as much accuracy in no more bytes",
    )


@check
def small_batch_accuracy(evidence: Evidence) -> Outcome:
    """The best plan at batch 8 that takes less memory than bp, beside bp and the head alone."""
    points = _points(evidence, "cifar10", 8)
    bp, head = points["bp"], points["head-only"]
    planned = max(
        (point for point in points.values() if point["family"] == "planned" and _bytes(point) < _bytes(bp)),
        key=lambda point: point["accuracy"],
        default=None,
    )
    if planned is None:
        return Outcome(
            f"batch 8: bp {_shown(bp)}, head alone {_shown(head)}",
            "contradicted",
            "no plan takes less memory than backpropagation",
        )
    lost = 100 * (bp["accuracy"] - planned["accuracy"])
    return Outcome(
        f"batch 8: bp {_shown(bp)}, planned LANCE {_shown(planned)}, head alone {_shown(head)}",
        graded(lost <= 2, planned["accuracy"] > head["accuracy"]),
        f"{_beside(lost)} backpropagation; one seed",
    )


@check
def second_data_set(evidence: Evidence) -> Outcome:
    """LANCE at the papers' threshold on satellite images."""
    points = _points(evidence, "eurosat", 128)
    bp, lance, head = (points[label] for label in ("bp", "all modes 0.7", "head-only"))
    lost = 100 * (bp["accuracy"] - lance["accuracy"])
    return Outcome(
        f"EuroSAT: bp {_shown(bp)}, LANCE at ε = 0.7 {_shown(lance)}, head alone {_shown(head)}",
        verdict_of_points(lost),
        f"{_beside(lost)} backpropagation; one seed",
    )


# ---- modes ---------------------------------------------------------------------------------


@check
def batch_mode(evidence: Evidence) -> Outcome:
    """Test accuracy of one small run with and without the batch mode."""
    rows = evidence.results("descent", "python -m experiments.descent")["training"]
    of = {row["modes"]: row["test_accuracy"] for row in rows if row["method"] == "LANCE"}
    compressed, left = of["all modes"], of["without batch"]
    return Outcome(
        f"convnet on digits, ε = 0.7: all modes {100 * compressed:.1f} %, without batch {100 * left:.1f} %, "
        f"channel alone {100 * of['channel only']:.1f} %",
        graded(compressed >= left),
        f"{100 * (left - compressed):.0f} points less, one small run: of shuffled images only the mean has a direction",
    )
