"""Checks of claims that are computed anew in seconds: the cost model, and the mathematics.

Each gives our figure, the verdict and why. The main case is MobileNetV2, last 4 layers, batch 128, ε = 0.7.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np

from experiments.ledger.accounting_rules import MIB, Figures
from experiments.ledger.evidence import Evidence, Outcome, check, graded
from experiments.ledger.explain import explain, figures_of, reports_of
from experiments.ledger.published import published

if TYPE_CHECKING:
    from lance_ref.algebra.geometry import Geometry

MAIN = {"net": "mobilenetv2", "batch": 128, "tune": "last:4", "num_classes": 1000}
NETS = ("mobilenetv2", "resnet18", "resnet34", "mcunet", "deit-tiny", "alexnet-cl")
MICROCONTROLLER, COMPUTER = 256 * 1024, 512 * MIB
ALEXNET = {"net": "alexnet-cl", "batch": 64, "tune": "all", "ranks": "0.25"}


def main_case() -> tuple[Figures, Figures]:
    """Figures of bp and lance of the main case."""
    figures = figures_of(**MAIN)
    return figures["bp"], figures["lance"]


# ---- memory --------------------------------------------------------------------------------


@check
def table_memory(evidence: Evidence) -> Outcome:
    """Every published memory of backpropagation, explained by one rule."""
    rows = [row for row in published()[1].values() if row.case.get("batch") == 64 and row.source == "lance"]
    found = [explain(row) for row in rows if row.quantity == "memory" and row.case.get("method", "bp") == "bp"]
    met = sum(each.status == "explained" and each.reading.rules == ("inputs-only",) for each in found if each.reading)
    verdict = graded(found and met == len(found))
    return Outcome(
        f"{met} of {len(found)} figures to the last digit", verdict,
        "as the inputs of the tuned convolutions alone: what BN and ReLU6 keep is left out",
    )  # fmt: skip


@check
def activation_reduction(evidence: Evidence) -> Outcome:
    """Bytes of bp over those of lance, under each accounting."""
    bp, lance = main_case()
    paper, tape, pytorch = bp.paper / lance.paper, bp.tape / lance.tape, bp.pytorch / lance.pytorch
    verdict = graded(pytorch >= 250, paper >= 250)
    return Outcome(
        f"{paper:,.0f}x of the papers' count, {tape:.1f}x of our tape, {pytorch:.2f}x of what PyTorch keeps", verdict,
        "true of the inputs of the tuned layers; in a usual framework most of the memory is kept by other operations",
    )  # fmt: skip


@check
def total_memory(evidence: Evidence) -> Outcome:
    """The papers' metric beside all that is kept."""
    bp, lance = main_case()
    with_factors = lance.tape + lance.factors
    return Outcome(
        f"papers' count {bp.paper / MIB:.1f} -> {lance.paper / MIB:.2f} MiB; PyTorch {bp.pytorch / MIB:.1f} -> "
        f"{lance.pytorch / MIB:.1f} MiB; our tape {bp.tape / MIB:.1f} -> {with_factors / MIB:.2f} MiB with factors",
        "contradicted" if bp.pytorch / lance.pytorch < 0.1 * bp.paper / lance.paper else "reproduced",
        "the metric is no measure of the total: it leaves out what stays when the inputs are gone",
    )  # fmt: skip


@check
def gpm_storage(evidence: Evidence) -> Outcome:
    """RAM and flash of GPM and of LANCE, by formula."""
    from analysis.rules.protection_costs import gpm_bill, lance_bill

    bills = []
    for row in reports_of(**ALEXNET)[0].rows:
        if not row.tuned or row.weight_shape is None:
            continue
        B, C_out, n = row.input_shape[0], row.weight_shape[0], int(np.prod(row.weight_shape[1:]))
        shape = (B, int(np.prod(row.output_shape[2:])), n) if len(row.output_shape) == 4 else (B, n)
        gpm = gpm_bill(shape, int(np.prod(row.input_shape)), C_out, n // 2)
        bills.append((gpm, lance_bill(shape, [max(1, size // 4) for size in shape], C_out, n // 2)))
    gpm_ram, lance_ram = (sum(pair[i].training_bytes for pair in bills) for i in (0, 1))
    flash = sum(gpm.flash_bytes for gpm, _ in bills)
    ratio = gpm_ram / lance_ram
    return Outcome(
        f"GPM {gpm_ram / MIB:.1f} MiB, LANCE {lance_ram / MIB:.1f} MiB in training ({ratio:.1f}x); bases of "
        f"{flash / MIB:.1f} MiB in flash for both",
        "bounded" if 1 < ratio < 10 else graded(ratio >= 10),
        "AlexNet, batch 64, half of all directions protected, ranks of a quarter: bases leave RAM, but must be kept",
    )


@check
def small_batches(evidence: Evidence) -> Outcome:
    """The saving at batch sizes of small devices."""
    parts, least, outweigh = [], float("inf"), 0.0
    for batch in (2, 4, 8):
        figures = figures_of(**{**MAIN, "batch": batch})
        bp, lance = figures["bp"], figures["lance"]
        of_all = bp.tape / (lance.tape + lance.factors)
        least, outweigh = min(least, of_all), max(outweigh, lance.factors / lance.tape)
        parts.append(f"batch {batch}: {bp.tape / lance.tape:.1f}x of the tape, {of_all:.1f}x with factors")
    return Outcome(
        "; ".join(parts), graded(least >= 10, least > 1),
        f"the factors do not shrink with the batch: at batch 2 they are {outweigh:.1f} times the tape",
    )  # fmt: skip


@check
def deployable(evidence: Evidence) -> Outcome:
    """A lower bound of what a step takes, beside what devices have."""
    plain = reports_of("mcunet", 1, "last:4", 10, ranks="0.25")[0]
    weights = 4 * sum(row.parameters for row in plain.rows)
    trained = 4 * sum(row.parameters for row in plain.rows if row.tuned)
    total = plain.totals["lance"]
    least = total.tape_and_factors + trained
    verdict = graded(least <= MICROCONTROLLER, least <= COMPUTER)
    return Outcome(
        f"MCUNet, batch 1: tape and factors {total.tape_and_factors / 1024:.0f} KiB, "
        f"gradients {trained / 1024:.0f} KiB, weights {weights / 1024:,.0f} KiB",
        verdict,
        f"at least {least / 1024:,.0f} KiB beside the weights, without activations in flight: "
        "a Raspberry Pi has that, a microcontroller of 256 KiB must tune less",
    )  # fmt: skip


@check
def peak_memory(evidence: Evidence) -> Outcome:
    """The most bytes that are live in one real step, measured."""
    (peak_bp, tape_bp), (peak, tape_bytes) = _peak(False), _peak(True)
    return Outcome(
        f"convnet on digits, batch 64: peak {peak_bp / 1024:,.0f} -> {peak / 1024:,.0f} KiB, "
        f"tape {tape_bp / 1024:.0f} -> {tape_bytes / 1024:.0f} KiB",
        "bounded" if tape_bytes < tape_bp and peak_bp / peak < tape_bp / tape_bytes else "reproduced",
        "measured by tracemalloc: workspaces and activations in flight do not shrink with the tape",
    )


def _peak(compressed: bool) -> tuple[int, int]:
    """Most bytes that are live in one training step of a small net, and those of its tape."""
    import gc
    import tracemalloc

    from lance_ref import calibrate, compress, datasets, models, tape, tune
    from lance_ref import functional as F

    x, y = next(datasets.batches(datasets.load("digits", "train"), 64, rng=0))
    net = models.create("convnet", in_channels=1, rng=0)
    tune(net, "last:2")
    if compressed:
        compress(net, calibrate(net, [x], epsilon=0.7))
    F.cross_entropy(net(x), y).backward()  # compiles what has to be compiled
    for parameter in net.parameters():
        parameter.grad = None
    gc.collect()
    already = tracemalloc.is_tracing()
    if not already:
        tracemalloc.start()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    loss = F.cross_entropy(net(x), y)
    kept = tape(loss).total_bytes
    loss.backward()
    peak = tracemalloc.get_traced_memory()[1] - before
    if not already:
        tracemalloc.stop()
    return peak, kept


# ---- work ----------------------------------------------------------------------------------


@check
def flops_less(evidence: Evidence) -> Outcome:
    """Work of bp over that of lance, as the papers bill it and as it is."""
    bp, lance = main_case()
    b, c = bp.tuned, lance.tuned
    theirs = (b.forward + b.grad_weight) / (c.forward + c.papers_grad_weight + c.full_projection)
    whole = _net_macs(bp) / _net_macs(lance)
    verdict = graded(whole >= 1.45, theirs >= 1.45)
    return Outcome(
        f"{theirs:.2f}x of forward and weight gradient of the tuned layers, {whole:.2f}x of the whole step", verdict,
        "the forward pass of the frozen layers and the input gradients stay as they are",
    )  # fmt: skip


def _net_macs(figures: Figures) -> int:
    work = figures.net
    return work.forward + work.grad_input + work.grad_weight + work.projection


@check
def asi_flops(evidence: Evidence) -> Outcome:
    """The most that any compression of activations can save."""
    work = main_case()[0]
    tuned, net = work.tuned, work.net
    most = (tuned.forward + tuned.grad_weight) / tuned.forward
    whole = (net.forward + net.grad_input + net.grad_weight) / (net.forward + net.grad_input)
    return Outcome(
        f"at most {most:.2f}x of forward and weight gradient, {whole:.2f}x of the whole step", "bounded",
        "even a weight gradient at no cost saves no more: it is one of three equal products of a tuned layer",
    )  # fmt: skip


@check
def projection_overhead(evidence: Evidence) -> Outcome:
    """The projection as it is computed, and as the papers bill it."""
    _, lance = main_case()
    share = lance.net.projection / _net_macs(lance)
    c = lance.tuned
    theirs = c.full_projection / (c.forward + c.papers_grad_weight + c.full_projection)
    figures = figures_of("mcunet", 128, "last:4", 10, ranks="0.25")["lance"].tuned
    quarter = figures.full_projection / (figures.forward + figures.papers_grad_weight + figures.full_projection)
    verdict = graded(share < 0.01, share < 0.1)
    return Outcome(
        f"{100 * share:.2f} % of the step; by the papers' own bill {100 * theirs:.1f} % of the tuned layers, "
        f"and {100 * quarter:.0f} % at ranks of a quarter (MCUNet)",
        verdict,
        "one mode after the other shrinks the tensor; billed at full size it would not be negligible",
    )


@check
def bp_never_blank(evidence: Evidence) -> Outcome:
    """All three products of backpropagation, for several nets."""
    works = {name: figures_of(name, 8, "last:4", 10, ranks="0.25")["bp"] for name in NETS}
    parts = [f"{name} {2 * _net_macs(figures) / 1e9:.2f}" for name, figures in works.items()]
    blank = [f for f in works.values() if not (f.net.forward and f.net.grad_input and f.net.grad_weight)]
    return Outcome(
        f"GFLOPs of backpropagation, last 4, batch 8: {', '.join(parts)}", "contradicted" if blank else "reproduced",
        "forward, input gradient and weight gradient are billed for every net, and none is zero",
    )  # fmt: skip


# ---- mathematics ---------------------------------------------------------------------------


@check
def full_rank(evidence: Evidence) -> Outcome:
    """The compressed weight gradient beside the exact one, at full rank."""
    worst = max(_full_rank_error(g, seed) for seed, g in enumerate(_geometries()))
    return Outcome(
        f"largest relative difference {worst:.0e}, {len(_geometries())} geometries, float64",
        graded(worst < 1e-12),
        "orthonormal factors of full rank change nothing but the rounding",
    )  # fmt: skip


@lru_cache(maxsize=1)
def _geometries() -> list[Geometry]:
    from lance_ref.algebra.geometry import ConvGeometry, LinearGeometry

    return [
        LinearGeometry((4, 6), (5, 6)),
        LinearGeometry((3, 4, 6), (5, 6)),
        ConvGeometry((3, 4, 6, 5), (7, 4, 1, 1)),
        ConvGeometry((3, 4, 6, 5), (7, 4, 3, 2), stride=(2, 1), padding=((1, 0), (0, 1))),
        ConvGeometry((3, 4, 7, 8), (6, 2, 3, 3), padding=((2, 2), (2, 2)), dilation=(2, 1), groups=2),
        ConvGeometry((3, 4, 6, 5), (4, 1, 3, 3), padding=((1, 1), (1, 1)), groups=4),
    ]


def _full_rank_error(g: Geometry, seed: int) -> float:
    from experiments.descent.cases import both_gradients, fixed_store, normal
    from lance_ref import Subspace

    rng = np.random.default_rng(seed)
    factors = Subspace.random(g.input_shape, g.input_shape, rng).factors
    exact, ours = both_gradients(g, fixed_store(g.input_shape, factors), *normal(g, rng))
    return float(np.linalg.norm(ours - exact) / np.linalg.norm(exact))


@check
def descent_direction(evidence: Evidence) -> Outcome:
    """Cosines of the examples that are to be checked by hand."""
    from experiments.descent.cases import EXAMPLES, both_gradients, cosine, fixed_store, normal, random_geometry
    from lance_ref import Subspace

    cosines = [
        cosine(*both_gradients(e.geometry, fixed_store(e.activation.shape, e.factors), e.activation, e.grad_output))
        for e in EXAMPLES.values()
    ]
    rng, feature = np.random.default_rng(0), []
    for _ in range(50):
        g = random_geometry("linear (B, I)", rng)
        factors = Subspace.random(g.input_shape, (None, int(rng.integers(1, g.input_shape[1] + 1))), rng).factors
        feature.append(cosine(*both_gradients(g, fixed_store(g.input_shape, factors), *normal(g, rng))))
    verdict = "contradicted" if min(cosines) < -0.01 else "reproduced"
    return Outcome(
        f"cosine {min(cosines):.2f} at worst in {len(cosines)} cases to check by hand; "
        f"feature mode alone: {min(feature):.2f} at worst in {len(feature)}",
        verdict,
        "an orthogonal projection of the activation is one of the gradient only for the feature mode, without groups",
    )


@check
def metrics_defined(evidence: Evidence) -> Outcome:
    """A matrix of two tasks, worked out by hand."""
    from lance_ref.continual.metrics import metrics

    m = metrics(np.array([[1.0, 0.5], [0.75, 1.0]]), np.array([0.5, 0.25]))
    right = (m.acc, m.bwt, m.fwt) == (0.875, -0.25, 0.25)
    return Outcome(
        f"R = [[1, 0.5], [0.75, 1]], b = [0.5, 0.25]: ACC {m.acc}, BWT {m.bwt}, FWT {m.fwt}",
        graded(right),
        "BWT: how much accuracy on earlier tasks has changed since they were learned; FWT: against a random network",
    )  # fmt: skip


@check
def no_device(evidence: Evidence) -> Outcome:
    """There is none here."""
    return Outcome("-", "not testable here", "needs a device: this project has run on a desktop processor only")


@check
def no_large_scale(evidence: Evidence) -> Outcome:
    """There is no such data set here."""
    return Outcome("-", "not testable here", "needs ImageNet, which is not among the data sets of this project")
