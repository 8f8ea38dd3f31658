"""What is known of accuracy: the committed experiments, of the same family of nets and the same way to train.

A method has evidence where an experiment trained a net of this family with the same engine and setting, in no more
layers than are chosen here. Methods that give backpropagation's gradient in another way have backpropagation's.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from analysis.commands.shipped import shipped
from analysis.planner.options import Option
from analysis.steps.methods import METHODS
from analysis.steps.register import exact

FILE = "measured.json"
FAMILIES = (("mcunet", "mobilenetv2"),)
"""Nets of one kind: inverted residual blocks, which were pretrained on ImageNet."""


@dataclass(frozen=True)
class Measured:
    """One row of a committed experiment."""

    net: str
    data: str
    layers: int
    accuracy: float  #: Of the test images, from 0 to 1; the mean over the seeds.
    sd: float
    seeds: int

    @property
    def shown(self) -> str:
        """Accuracy and where it is from.

        >>> Measured("mcunet", "CIFAR-10", 4, 0.746, 0.004, 3).shown
        '74.6 ± 0.4 % on CIFAR-10, mcunet with its last 4 layers'
        """
        trained = f"with its last {self.layers} layers" if self.layers else "with its head alone"
        return f"{100 * self.accuracy:.1f} ± {100 * self.sd:.1f} % on {self.data}, {self.net} {trained}"


def measured(net: str, option: Option, layers: int) -> Measured | None:
    """What was measured of this option on a net of the family of ``net``; None if nothing was."""
    name = net.partition("@")[0]
    family = next((of for of in FAMILIES if name in of), ())
    data, rows = _file()
    method = "bp" if METHODS[option.method].fidelity is exact and option.method != "head-only" else option.method
    own = {"method": method, "engine": option.engine, **_setting(option)}
    found = [
        row
        for row in rows
        if row["net"] in family
        and row["layers"] <= layers
        and all(row.get(key) == own[key] for key in own)
        # a setting that the experiment had and the option has not is another way to train
        and not {"epsilon", "directions", "patch", "ratio"} & set(row) - set(own)
    ]
    if not found:
        return None
    best = max(found, key=lambda row: row["layers"])
    return Measured(best["net"], data, best["layers"], best["accuracy"], best["sd"], best["seeds"])


def _setting(option: Option) -> dict[str, Any]:
    """The option's setting, by the names of the file."""
    own: dict[str, Any] = {}
    for name in ("epsilon", "directions", "core_bits"):
        if getattr(option, name) is not None:
            own[name] = getattr(option, name)
    if option.by_image:
        own["by_image"] = True
    if option.fraction is not None:
        own["fraction"] = float(option.fraction)
    if option.update:
        own["update"] = option.update
    for setting in METHODS[option.method].settings:
        if setting.name in ("patch", "ratio"):
            own[setting.name] = getattr(option.settings, setting.name)
    if option.settings.update is not None:
        own["coordinates"] = option.settings.update
    return own


@cache
def _file() -> tuple[str, Sequence[dict[str, Any]]]:
    document = json.loads(shipped(FILE).read_text(encoding="utf-8"))
    return document["data"], document["rows"]
