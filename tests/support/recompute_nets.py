"""Random nets with recomputed segments, each beside its twin without; shared by the recompute tests."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import strategies as st

from lance_ref import Tensor, nn, record, tune
from lance_ref.algebra.subspace import Subspace
from lance_ref.nn.module import Module
from lance_ref.nn.selection import weighted_layers
from lance_ref.stores import Lance

CHANNELS, SIZE = 4, (5, 6)


class Residual(Module):
    """x + body(x): the input has two users, and gets its gradient in two parts."""

    def __init__(self, body: Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def layer(name: str, seed: int) -> Module:
    """One layer that keeps the shape (B, 4, H, W)."""
    makers: dict[str, Any] = {
        "conv": lambda: nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, rng=seed),
        "depthwise": lambda: nn.Conv2d(CHANNELS, CHANNELS, (1, 3), padding="same", groups=4, bias=False, rng=seed),
        "norm": lambda: nn.BatchNorm2d(CHANNELS),
        "dropout": lambda: nn.Dropout(0.4, rng=seed),
        "shared dropout": lambda: nn.Dropout(0.4),  # draws from the library's default generator
        "relu": nn.ReLU,
        "hardswish": nn.Hardswish,
        "tanh": nn.Tanh,
        "identity": nn.Identity,
    }
    return makers[name]()


LAYERS = ("conv", "depthwise", "norm", "dropout", "shared dropout", "relu", "hardswish", "tanh", "identity")


@st.composite
def plans(draw: Any, depth: int = 3) -> list[Any]:
    """A list of (layer, seed) and of ("segment" or "residual", a plan)."""
    plan: list[Any] = []
    for _ in range(draw(st.integers(1, 4))):
        kind = draw(st.sampled_from(("segment", "residual", "layer", "layer") if depth else ("layer",)))
        if kind == "layer":
            plan.append((draw(st.sampled_from(LAYERS)), draw(st.integers(0, 99))))
        else:
            plan.append((kind, draw(plans(depth - 1))))
    return plan


def stack(plan: list[Any], recompute: bool) -> Module:
    """The modules of a plan; without ``recompute`` the segments are plain, under the same paths."""
    modules = []
    for kind, rest in plan:
        if kind == "segment":
            inner = stack(rest, recompute)
            modules.append(nn.Recompute(inner) if recompute else inner)
        else:
            modules.append(Residual(stack(rest, recompute)) if kind == "residual" else layer(kind, rest))
    return nn.Sequential(*modules)


def net(plan: list[Any], recompute: bool = True) -> Module:
    """The plan between a first convolution (2 → 4 channels) and a head of three classes."""
    return nn.Sequential(
        nn.Conv2d(2, CHANNELS, 1, rng=1),
        stack(plan, recompute),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(CHANNELS, 3, rng=2),
    )


@st.composite
def tunings(draw: Any) -> dict[str, Any]:
    """Arguments of ``tune`` that fit any of these nets."""
    return {
        "selection": draw(st.sampled_from(["all", "head", "last:1", "0"])),
        "train_batchnorm": draw(st.booleans()),
    }


def compress_at_random(module: Module, B: int, dtype: Any) -> None:
    """LANCE with random factors on every tuned layer."""
    with record() as records:
        module(Tensor.meta((B, 2, *SIZE), dtype))
    shapes: dict[str, tuple[int, ...]] = {}

    def collect(found: list[Any]) -> None:
        for each in found:
            if each.op in ("conv2d", "linear"):
                shapes[each.path] = each.inputs[0].shape
            collect(each.attributes.get("records", []))

    collect(records)
    rng = np.random.default_rng(5)
    for path in module.tuning.layers:
        ranks = tuple(-(-n // 2) for n in shapes[path])
        weighted_layers(module)[path].store = Lance(Subspace.random(shapes[path], ranks, rng), dtype=dtype)


def small() -> Module:
    """A net for ``--net recompute_nets:small``: nested segments, dropout, batch norm, a residual."""
    inner = nn.Recompute(nn.Sequential(layer("conv", 3), nn.Tanh()))
    body = nn.Sequential(layer("norm", 0), nn.ReLU(), nn.Dropout(0.2), Residual(inner), layer("depthwise", 4))
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3, rng=0),
        nn.Recompute(body),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 5, rng=1),
    )
    tune(module, "all")
    return module
