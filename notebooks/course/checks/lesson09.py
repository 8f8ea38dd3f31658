"""Lesson 9: multiply-adds of a convolution, the cheapest order, and when a calibration is paid back."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np

from course.checking import answered, exercise, whole_number


@exercise("9.1")
def convolution(answer: Any) -> str | None:
    once = 4 * 32 * 10 * 10 * (16 // 4) * 9
    hints = {
        once: "that is the forward pass alone",
        2 * once: "two gradients come on top of the forward pass, each as large",
        6 * once: "those are FLOPs: one multiply-add is two",
        12 * once: "an output sees only the channels of its own group",
        4 * 3 * once: "an output sees only the channels of its own group",
        4 * once: "an output sees only the channels of its own group; and backward?",
    }
    return whole_number(answer, 3 * once, hints, "B · C' · H' · W' · (C / g) · 9, three times")


def chain_macs(shape: Sequence[int], ranks: Sequence[int], order: Sequence[int]) -> int:
    """Multiply-adds of mode products in this order."""
    sizes, macs = [int(n) for n in shape], 0
    for mode in order:
        macs += int(np.prod(sizes)) * int(ranks[mode])
        sizes[mode] = int(ranks[mode])
    return macs


@exercise("9.2")
def sorted_order(answer: Any) -> str | None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        shape = [int(n) for n in rng.integers(2, 20, 4)]
        ranks = [int(rng.integers(1, n + 1)) for n in shape]
        order = [int(mode) for mode in answered(answer(shape, ranks))]
        if sorted(order) != [0, 1, 2, 3]:
            return f"for {shape} it gives {order}, expected each of the modes 0 to 3 once"
        best = min(chain_macs(shape, ranks, each) for each in itertools.permutations(range(4)))
        if chain_macs(shape, ranks, order) != best:
            found = chain_macs(shape, ranks, order)
            return (
                f"for {shape} and ranks {ranks} the order {order} takes {found:,} multiply-adds, and {best:,} would do"
            )
    return None


@exercise("9.3")
def steps_to_pay_back(answer: Any) -> str | None:
    for once, ours, theirs, right in ((100, 1, 11, 10), (101, 1, 11, 11), (7, 0, 2, 4)):
        found = answered(answer(once, ours, theirs))
        if found != right:
            return f"for {once} once and {ours} against {theirs} at a step it gives {found}; try it by hand"
    return None
