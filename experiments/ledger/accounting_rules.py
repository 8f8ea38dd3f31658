"""The ways in which a published cost may have been counted, as rules that are tried on our own figures.

A reading is a set of rules. Without any of them a figure is what its words say: memory is every array that the
framework's autograd keeps, in the unit as printed; work is the FLOPs of a whole training step, 2 for each multiply-add,
as executed. Each rule takes one thing out, counts one thing otherwise, or calls a unit by another's name.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

MIB, MB = 2**20, 10**6
RULES = {
    "inputs-only": "BN and ReLU6 inputs left out, and all else: the inputs (or cores) of the tuned layers alone",
    "no-core": "the compressed cores themselves left out",
    "with-factors": "the fixed factors counted with the cores",
    "with-activations": "the inputs of the tuned layers counted with the bases",
    "MB-for-MiB": "MB written for MiB, 2^20 bytes",
    "MACs-for-FLOPs": "FLOPs written for multiply-adds, one in place of two",
    "tuned-only": "frozen layers and the head left out",
    "no-grad-input": "the gradients of the layers' inputs left out",
    "forward-twice": "the forward pass counted twice",
    "projection-at-full-size": "the projection billed at the full size of the tensor for every mode, B·C·H·W·Σr",
    "papers-order": "the weight gradient in the papers' order, though another is cheaper",
}
"""Name and meaning; the order is that in which they are listed."""

OF_COMPRESSION = {"no-core", "with-factors", "projection-at-full-size", "papers-order"}
"""Rules about what only a compressing method has."""


@dataclass(frozen=True)
class Work:
    """Multiply-adds of one step of a method, of the whole net or of the tuned layers.

    ``papers_grad_weight`` and ``full_projection`` are the same two as the papers bill them.
    """

    forward: int
    grad_input: int
    grad_weight: int
    projection: int
    papers_grad_weight: int
    full_projection: int


@dataclass(frozen=True)
class Figures:
    """What the cost model says of one method: bytes under each accounting, and multiply-adds.

    ``bases`` are the bytes of an orthogonal basis of the whole input space of every tuned layer, Σ n² numbers, n =
    C_in·k_h·k_w: the most that a projection memory such as GPM's can grow to.
    """

    paper: int
    pytorch: int
    tape: int
    factors: int
    bases: int
    net: Work
    tuned: Work


@dataclass(frozen=True)
class Reading:
    """A value in the unit of the published figure, and the rules that it takes; ``rules`` as in :data:`RULES`."""

    value: float
    rules: tuple[str, ...]


def readings(quantity: str, unit: str, figures: Figures, base: Figures) -> list[Reading]:
    """Every reading of a quantity, those with the fewest rules first; each value once.

    ``quantity`` is "memory", "memory-ratio", "work", "work-ratio" or "bases", and ``unit`` "MiB", "MB", "GFLOPs", or
    "x" of ratios. The published figure is of the method of ``figures``; ``base`` is plain backpropagation. A ratio is
    that of ``base`` over ``figures``, both read by the same rules.

    Examples
    --------
    >>> work = Work(10, 0, 5, 0, 5, 0)
    >>> of = Figures(2**20, 3 * 2**20, 2**20, 0, 0, work, work)
    >>> [(round(r.value, 3), r.rules) for r in readings("memory", "MB", of, of)]
    [(3.146, ()), (3.0, ('MB-for-MiB',)), (1.049, ('inputs-only',)), (1.0, ('inputs-only', 'MB-for-MiB'))]
    """
    compressed = figures.factors > 0
    if quantity in ("memory", "memory-ratio", "bases"):
        found = _memory(quantity, unit, figures, base, compressed)
    elif quantity in ("work", "work-ratio"):
        found = _work(quantity, figures, base, compressed)
    else:
        raise ValueError(f"quantity is {quantity!r}, expected memory, memory-ratio, work, work-ratio or bases")
    listed: dict[float, Reading] = {}
    for value, rules in sorted(found, key=lambda reading: len(reading[1])):
        listed.setdefault(value, Reading(value, tuple(name for name in RULES if name in rules)))
    return list(listed.values())


Found = Iterator[tuple[float, frozenset[str]]]


def _memory(quantity: str, unit: str, figures: Figures, base: Figures, compressed: bool) -> Found:
    """The readings of a memory: which arrays are counted, and in which unit."""
    counted: list[tuple[int, int, frozenset[str]]]
    if quantity == "bases":
        counted = [(figures.bases, 0, frozenset()), (figures.bases + base.paper, 0, frozenset({"with-activations"}))]
    else:
        counted = [
            (figures.pytorch, base.pytorch, frozenset()),
            (figures.paper, base.paper, frozenset({"inputs-only"})),
        ]
        if compressed:
            counted += [
                (figures.pytorch - figures.paper, base.pytorch, frozenset({"no-core"})),
                (figures.pytorch + figures.factors, base.pytorch, frozenset({"with-factors"})),
                (figures.paper + figures.factors, base.paper, frozenset({"inputs-only", "with-factors"})),
            ]
    for nbytes, of_base, rules in counted:
        if quantity == "memory-ratio":
            yield of_base / nbytes, rules
        elif unit == "MiB":
            yield nbytes / MIB, rules
        elif unit == "MB":
            yield nbytes / MB, rules
            yield nbytes / MIB, rules | {"MB-for-MiB"}
        else:
            raise ValueError(f"unit is {unit!r}, expected MiB or MB for {quantity}")


def _work(quantity: str, figures: Figures, base: Figures, compressed: bool) -> Found:
    """The readings of a cost: which products of which layers are counted, and as how much each."""
    names = ["tuned-only", "no-grad-input", "forward-twice"]
    names += ["projection-at-full-size", "papers-order"] if compressed else []
    names += ["MACs-for-FLOPs"] if quantity == "work" else []
    for chosen in product((False, True), repeat=len(names)):
        rules = frozenset(name for name, taken in zip(names, chosen, strict=True) if taken)
        if quantity == "work-ratio":
            yield _macs(base, rules) / _macs(figures, rules), rules
        else:
            yield (1 if "MACs-for-FLOPs" in rules else 2) * _macs(figures, rules) / 1e9, rules


def _macs(figures: Figures, rules: frozenset[str]) -> int:
    work = figures.tuned if "tuned-only" in rules else figures.net
    return (
        work.forward * (2 if "forward-twice" in rules else 1)
        + (0 if "no-grad-input" in rules else work.grad_input)
        + (work.papers_grad_weight if "papers-order" in rules else work.grad_weight)
        + (work.full_projection if "projection-at-full-size" in rules else work.projection)
    )


def rounding(printed: str) -> float:
    """Half a unit in the last place of a number as it is printed.

    >>> rounding("28.71"), rounding("105"), rounding("5.75e3")
    (0.005, 0.5, 5.0)
    """
    mantissa, _, exponent = printed.lower().partition("e")
    decimals = len(mantissa.partition(".")[2])
    return 0.5 * 10.0 ** (int(exponent or 0) - decimals)


def nearest(value: float, listed: list[Reading]) -> Reading:
    """The reading whose value is nearest, as a ratio; of equals the one with fewer rules."""
    return min(listed, key=lambda reading: (abs(math.log(reading.value / value)), len(reading.rules)))


def fits(value: float, tolerance: float, listed: list[Reading]) -> list[Reading]:
    """The readings that are within the rounding of the printed value, those with the fewest rules first."""
    slack = 1e-9 * abs(value)  # 532.875 is printed as 532.88
    return [reading for reading in listed if abs(reading.value - value) <= tolerance + slack]
