"""The plan of a fused pass: groups and bytes worked out by hand, places that never overlap, the peak's own figures."""

from __future__ import annotations

from typing import Any

import fused_nets
import numpy as np
import pytest
from hypothesis import given

from analysis.peak import fused as of_the_peak
from lance_ref import models, no_grad
from lance_ref.engine.recording import OpRecord
from lance_ref.fused import deferral
from lance_ref.fused.plan import ALIGNED, Group, Op, PassPlan, maps_read, plan
from lance_ref.nn.module import Module
from lance_ref.nn.tracing import trace

ONE = ((0, 0), (0, 0))


def conv(operand: int, shape: tuple[int, ...], weight: tuple[int, ...], groups: int = 1, pad: int = 0) -> Op:
    padding = ((pad, pad), (pad, pad))
    return Op("conv2d", (operand,), shape, (weight, (1, 1), padding, (1, 1), groups, False))


BLOCK = [
    conv(-1, (32, 8, 8), (32, 16, 1, 1)),
    Op("batch_norm", (0,), (32, 8, 8)),
    Op("relu6", (1,), (32, 8, 8)),
    conv(2, (32, 8, 8), (32, 1, 3, 3), groups=32, pad=1),
    Op("relu6", (3,), (32, 8, 8)),
    conv(4, (16, 8, 8), (16, 32, 1, 1)),
    Op("batch_norm", (5,), (16, 8, 8)),
    Op("add", (-1, 6), (16, 8, 8)),
]
"""An inverted residual with 16 channels, expanded to 32, on maps of 8x8."""


def test_an_inverted_residual_by_hand() -> None:
    """Three groups; most is alive in the second, with the input that is added in the third."""
    made = plan(BLOCK, [(16, 8, 8)], [7], batch=64, item=4, threads=2)
    assert made.groups == [
        Group(0, [-1], 2, norm=1, activation=2),
        Group(3, [2], 4, activation=4),
        Group(5, [4], 7, norm=6, addition=(7, -1)),
    ]
    narrow, wide = 16 * 64 * 4, 32 * 64 * 4
    assert (made.workers, made.chunk) == (2, 16)  # two threads hold half of the batch
    assert made.arena_bytes == 16 * (narrow + 2 * wide) + 32 * 9 * 4  # and the weight of the depthwise convolution
    assert {g: shape for g, (_, shape) in made.workspaces.items()} == {1: (3, 3, 32)}


def test_the_cache_limits_images() -> None:
    """2 MiB: 102 images of 20,480 bytes."""
    made = plan(BLOCK, [(16, 8, 8)], [7], batch=10_000, item=4, threads=2)
    assert made.chunk == 2 * 2**20 // 20480 == 102


def test_little_work_stays_in_one_thread() -> None:
    """A thread costs more than so little work."""
    assert plan(BLOCK, [(16, 8, 8)], [7], batch=2, item=4, threads=2).workers == 1


def test_what_is_asked_for_ends_a_group() -> None:
    """A value that is written down cannot be overwritten by what follows it."""
    made = plan(BLOCK, [(16, 8, 8)], [0, 7], batch=4, item=4, threads=1)
    assert [(group.source, group.result) for group in made.groups] == [(0, 0), (None, 2), (3, 4), (5, 7)]


def overlaps(made: PassPlan, ops: list[Op], shapes: dict[int, tuple[int, ...]], item: int) -> list[tuple[int, int]]:
    """Pairs of maps that lie in the same bytes while both are needed."""
    needed: dict[int, list[int]] = {}
    for g, group in enumerate(made.groups):
        for ref in (*maps_read(group, ops), group.result):
            needed.setdefault(ref, []).append(g)
    blocks = [
        (ref, made.places[ref], made.chunk * int(np.prod(shapes[ref])) * item, min(of), max(of))
        for ref, of in needed.items()
    ]
    blocks += [(-100 - g, at, int(np.prod(shape)) * item, g, g) for g, (at, shape) in made.workspaces.items()]
    assert all(at % ALIGNED == 0 and at + size <= made.arena_bytes for _, at, size, _, _ in blocks)
    return [
        (a[0], b[0])
        for i, a in enumerate(blocks)
        for b in blocks[:i]
        if a[1] < b[1] + b[2] and b[1] < a[1] + a[2] and a[3] <= b[4] and b[3] <= a[4]
    ]


class Watched:
    """The plans that a call makes."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.plans: list[tuple[PassPlan, tuple[Any, ...]]] = []
        patch.setattr(deferral, "plan", self._plan)
        patch.setattr(deferral, "_plans", type(deferral._plans)())

    def _plan(self, *arguments: Any) -> PassPlan:
        made = plan(*arguments)
        self.plans.append((made, arguments))
        return made


@given(graph=fused_nets.graphs())
def test_maps_never_overlap(graph: tuple[Any, ...]) -> None:
    """Two maps at one place are a wrong number, perhaps only on some machine."""
    channels, steps, kept, seed = graph
    net = fused_nets.Graph(channels, steps, kept, np.random.default_rng(seed))
    with pytest.MonkeyPatch.context() as patch, no_grad(), np.errstate(all="ignore"):
        watched = Watched(patch)
        net(np.ones((5, channels, 6, 7), np.float32))
    for made, (ops, outside, _, _, item, _) in watched.plans:
        shapes = {i: op.shape for i, op in enumerate(ops)} | {-1 - i: shape for i, shape in enumerate(outside)}
        assert overlaps(made, ops, shapes, item) == []


def test_planted_overlaps_are_found() -> None:
    """The check above sees two maps at one place."""
    made = plan(BLOCK, [(16, 8, 8)], [7], batch=4, item=4, threads=1)
    shapes = {i: op.shape for i, op in enumerate(BLOCK)} | {-1: (16, 8, 8)}
    assert overlaps(made, BLOCK, shapes, 4) == []
    made.places[4] = made.places[2]
    assert (4, 2) in overlaps(made, BLOCK, shapes, 4)


NETS = [
    ("mobilenetv2", 64, 8),
    ("mcunet", 64, 5),
    ("resnet18", 160, 2),
    ("resnet8", 32, 16),
    ("mobilenetv3-small", 64, 4),
]


@pytest.mark.parametrize(("name", "size", "batch"), NETS, ids=[name for name, _, _ in NETS])
def test_the_peak_has_the_same_arenas(name: str, size: int, batch: int) -> None:
    """Two derivations, from the operations and from the records, to the byte."""
    net = models.create(name, num_classes=5, rng=0).eval()
    with pytest.MonkeyPatch.context() as patch, no_grad():
        watched = Watched(patch)
        net(np.zeros((batch, 3, size, size), np.float32))
        found = [of_the_peak.held(records, wanted) for records, wanted in stretches(net, (batch, 3, size, size))]
    plans = [made for made, _ in watched.plans]
    assert [held.images for held in found] == [made.chunk for made in plans]
    assert [held.arenas for held in found] == [made.workers * (made.arena_bytes + ALIGNED) for made in plans]


def stretches(net: Module, shape: tuple[int, ...]) -> list[tuple[list[OpRecord], list[int]]]:
    """What is put off together in a net whose forward keeps nothing: records, and what is read of them at the end."""
    put_off, found = of_the_peak.PutOff(), []
    records = trace(net, shape)
    for i, record in enumerate([*records, None]):
        if record is not None and put_off.takes(record):
            put_off.add(record)
            continue
        waiting = [r for r in put_off.records if r.op not in of_the_peak.AT_THE_END]
        read = {value.id for later in (*put_off.records, *records[i:]) for value in later.inputs}
        inner = {value.id for r in waiting for value in r.inputs}
        last = [r.output.id for r in waiting if r.output.id in read - inner or r is waiting[-1]]
        if len(waiting) > 1:
            found.append((waiting, last))
        put_off.clear()
    return found
