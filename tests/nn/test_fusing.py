"""The report of what runs fused says what is run."""

from __future__ import annotations

import numpy as np
import pytest

import lance_ref
from lance_ref import models, no_grad
from lance_ref.fused import deferral
from lance_ref.fused.plan import PassPlan, plan


def test_a_frozen_prefix_by_hand() -> None:
    """MobileNetV2, last:4: 17 blocks and the first layer are frozen; 48 convolutions in as many groups."""
    net = models.create("mobilenetv2", num_classes=10, rng=0)
    lance_ref.tune(net, "last:4")
    found = lance_ref.fuse(net, (32, 3, 224, 224))
    (stretch,) = found.stretches
    assert (stretch.first, stretch.last, stretch.images) == ("features.0.0", "features.16", 1)
    assert stretch.groups == {
        "conv2d + batch_norm + relu6": 32,
        "conv2d + batch_norm + add": 10,
        "conv2d + batch_norm": 6,
    }
    assert found.unfused["conv2d", "it is trained, or gradients go through it"] == 4
    text = str(found)
    assert "features.0.0 to features.16: 1 image at a time in " in text
    assert "    32 x conv2d + batch_norm + relu6" in text


def test_it_is_what_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """The report plans from shapes, the call from what was put off."""
    net, made = models.create("resnet8", num_classes=10, rng=0).eval(), []

    def noted(*arguments: object) -> PassPlan:
        made.append(plan(*arguments))  # type: ignore[arg-type]
        return made[-1]

    monkeypatch.setattr(deferral, "plan", noted)
    monkeypatch.setattr(deferral, "_plans", type(deferral._plans)())
    with no_grad():
        found = lance_ref.fuse(net, (8, 3, 32, 32))
        net(np.zeros((8, 3, 32, 32), np.float32))
    assert [(s.images, s.workers, s.arena_bytes, s.groups.total()) for s in found.stretches] == [
        (p.chunk, p.workers, p.arena_bytes, len(p.groups)) for p in made
    ]


def test_nothing_is_fused_where_all_trains_or_it_is_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both are said, with the reason."""
    net = models.create("convnet", rng=0)
    assert "nothing is fused" in str(lance_ref.fuse(net, (2, 3, 16, 16)))
    monkeypatch.setattr(deferral, "enabled", lambda: False)
    with no_grad():
        found = lance_ref.fuse(net, (2, 3, 16, 16))
    assert not found.stretches
    assert found.unfused["conv2d", "LANCE_REF_FUSE is 0"] == 3
