"""What the planner can choose from, and how its limits are written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import product
from typing import Any

from analysis.steps.methods import METHODS
from analysis.steps.settings import Settings

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
DEFAULT_BATCHES = (1, 2, 4, 8, 16, 32)
DEFAULT_EPSILONS = (0.7, 0.9, 0.99)
ASSUMED_FRACTION = Fraction(1, 4)
"""The rank as a fraction of each mode, where there are no spectra: the cost model assumes the same."""


COMBINATIONS: dict[str, tuple[Mapping[str, Any], ...]] = {
    name: (
        {},
        {"by_image": True},
        {"by_image": True, "in_subspace": True},
        {"in_subspace": True, "core_bits": 8},
    )
    for name in ("lance", "lance-mean-free")
}
"""What a method is tried with besides its own settings, from the plain one, which experiments have measured, to the
smallest. A core in codes depends on all images of a batch (one range for each slice), so it takes whole batches."""


@dataclass(frozen=True)
class Option:
    """One method with its settings, for any number of layers and any number of images at a time."""

    method: str  #: One of :data:`analysis.steps.methods.METHODS`.
    settings: Settings = field(default_factory=Settings)
    epsilon: float | None = None  #: Energy threshold of the ranks, for methods that have ranks.
    fraction: Fraction | None = None  #: Of each mode, in place of ``epsilon``.
    directions: int | None = None  #: Of channels alone, in place of ``epsilon``.
    update: str = ""  #: Of a device program: after a ``batch`` or each ``image``; empty for a step of the library.
    by_image: bool = False  #: The mode of the batch is left alone, so that each image has a core of its own.
    core_bits: int | None = None  #: 8: cores as codes.
    batch: int | None = None  #: Images of an update, which go a few at a time; None: all of them at once.
    elsewhere: bool = False  #: Another machine finds the subspaces.

    @property
    def engine(self) -> str:
        """``library`` or ``device``."""
        return "device" if self.update else "library"

    @property
    def in_subspace(self) -> bool:
        """Whether coordinates in the subspace train in place of the whole weight."""
        return bool(self.update) or self.settings.of(METHODS[self.method].names).get("update") == "subspace"

    @property
    def setting(self) -> str:
        """The settings in a few words; empty for a method without any.

        >>> Option("lance", epsilon=0.9).setting, Option("gradient-filter").setting, Option("bp").setting
        ('epsilon 0.9', 'patch 2', '')
        """
        ranks = "" if self.epsilon is None else f"epsilon {self.epsilon:g}"
        if self.fraction is not None:
            ranks = f"ranks {float(self.fraction):g}"
        if self.directions is not None:
            ranks = f"{self.directions} directions"
        update = f"update {self.update}" if self.update else ""
        offered = [setting for setting in METHODS[self.method].settings if setting.grid is not None]
        more = (
            *(of.shown(getattr(self.settings, of.name)) for of in offered),
            "by image" if self.by_image else "",
            f"{self.core_bits}-bit core" if self.core_bits else "",
        )
        return ", ".join(filter(None, (ranks, update, *more)))

    @property
    def name(self) -> str:
        """Method and settings."""
        return f"{self.method} {self.setting}".rstrip()


def options_for(
    methods: Sequence[str],
    epsilons: Sequence[float],
    fractions: Sequence[Fraction],
    grids: Mapping[str, Sequence[Any]] | None = None,
    combined: bool = False,
) -> list[Option]:
    """Every method with every one of its settings, in the order of the register; ``combined``: and with others'.

    >>> [option.name for option in options_for(["int8", "lance"], [0.7], [Fraction(1, 2)])]
    ['int8', 'lance epsilon 0.7', 'lance ranks 0.5']
    """
    options: list[Option] = []

    def add(method: str, settings: Settings, **ranks: Any) -> None:
        for more in COMBINATIONS.get(method, ({},)) if combined else ({},):
            own, told = dict(more), settings
            if own.pop("in_subspace", False):
                told = Settings(**{**settings.of(METHODS[method].names), "update": "subspace"})
            options.append(Option(method, told, **ranks, **own))

    for method in methods:
        entry = METHODS[method]
        tried = {of.name: (grids or {}).get(of.name, of.grid) for of in entry.settings if of.grid is not None}
        for values in product(*tried.values()):
            settings = Settings(**dict(zip(tried, values, strict=True)))
            if entry.ranks is None:
                options.append(Option(method, settings))
            else:
                for epsilon in epsilons:
                    add(method, settings, epsilon=epsilon)
                for fraction in fractions:
                    add(method, settings, fraction=fraction)
    return list(dict.fromkeys(options))


def in_parts(options: Sequence[Option], batch: int) -> list[Option]:
    """Each option, and after it the same one with updates after ``batch`` images, which go a few at a time.

    >>> [(option.name, option.batch) for option in in_parts([Option("bp"), Option("int8")], 32)]
    [('bp', None), ('bp', 32), ('int8', None), ('int8', 32)]
    """
    return [
        each
        for option in options
        for each in (option, replace(option, batch=batch))
        if each is option or not METHODS[option.method].parts
    ]


def calibrated(options: Sequence[Option]) -> list[Option]:
    """Each option, and for one that is calibrated, after it the same one with subspaces that another machine finds.

    >>> [option.elsewhere for option in calibrated([Option("bp"), Option("lance", epsilon=0.7)])]
    [False, False, True]
    """
    return [
        each
        for option in options
        for each in (option, replace(option, elsewhere=True))
        if each is option or METHODS[option.method].calibration is not None
    ]


def parse_bytes(text: str) -> int:
    """A budget: a number and a unit, ``B``, ``KiB``, ``MiB`` or ``GiB``; parts of a byte are dropped.

    Raises ValueError for anything else: signs, exponents, NaN, decimal units, no unit, nothing at all.

    >>> parse_bytes("256KiB"), parse_bytes("0.5 MiB")
    (262144, 524288)
    """
    match = re.fullmatch(r"([0-9]{1,15}(?:\.[0-9]{1,9})?) ?(B|KiB|MiB|GiB)", text, re.ASCII)
    nbytes = int(Fraction(match[1]) * UNITS[match[2]]) if match else 0
    if nbytes < 1:
        raise ValueError(
            f"--budget is {text[:60]!r}, expected a positive number and a unit, like 256KiB, 1.5MiB or 300000B "
            "(1 KiB = 1024 bytes)"
        )
    return nbytes


def unit_of(text: str) -> str:
    """The unit in which a budget is written, KiB for bytes: sizes are shown in it.

    >>> unit_of("8MiB"), unit_of("300000B")
    ('MiB', 'KiB')
    """
    match = re.search(r"[KMG]iB", text)
    return match[0] if match else "KiB"


@dataclass(frozen=True)
class Target:
    """What is to be reached: an accuracy in per cent that was measured, a predicted fidelity, or a number of layers."""

    kind: str  #: {"accuracy", "fidelity", "layers"}
    value: float

    def __str__(self) -> str:
        if self.kind == "accuracy":
            return f"an accuracy of {self.value:g} %"
        if self.kind == "fidelity":
            return f"a predicted fidelity of {self.value:g}"
        return f"{self.value:g} layer{'' if self.value == 1 else 's'}"


def parse_target(text: str) -> Target:
    """A target as it is written.

    Raises ValueError for anything else than ``accuracy=74`` (per cent, up to 100), ``fidelity=0.3`` (up to 1) or
    ``layers=10``.

    >>> str(parse_target("accuracy=74.5")), str(parse_target("layers=1"))
    ('an accuracy of 74.5 %', '1 layer')
    """
    match = re.fullmatch(r"(accuracy|fidelity|layers)=([0-9]{1,6}(?:\.[0-9]{1,6})?)", text, re.ASCII)
    kind, value = (match[1], float(match[2])) if match else ("", 0.0)
    most = {"accuracy": 100, "fidelity": 1}.get(kind, 10**6)
    if not 0 < value <= most or (kind == "layers" and value != int(value)):
        raise ValueError(
            f"--target is {text[:60]!r}, expected accuracy=74 (per cent), fidelity=0.3 (up to 1) or layers=10"
        )
    return Target(kind, value)


def parse_times(text: str) -> Fraction:
    """A limit relative to backpropagation: ``1.5x`` or ``1.5``.

    Raises ValueError for anything that is no positive number.

    >>> parse_times("1.5x")
    Fraction(3, 2)
    """
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,9})?)x?", text, re.ASCII)
    if match is None or not Fraction(match[1]):
        raise ValueError(f"--flops-at-most is {text[:60]!r}, expected a positive number of times, like 1.5x")
    return Fraction(match[1])


def parse_fraction_of_modes(text: str) -> Fraction:
    """A fraction of each mode, in (0, 1].

    >>> parse_fraction_of_modes("0.25")
    Fraction(1, 4)
    """
    match = re.fullmatch(r"[0-9](?:\.[0-9]{1,9})?", text, re.ASCII)
    if match is None or not 0 < Fraction(text) <= 1:
        raise ValueError(f"--ranks is {text[:60]!r}, expected fractions of each mode in (0, 1], like 0.25")
    return Fraction(text)
