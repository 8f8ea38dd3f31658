"""What the planner can choose from, and how its limits are written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import product
from typing import Any

from analysis.steps.methods import METHODS
from analysis.steps.settings import Settings

UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
DEFAULT_BATCHES = (1, 2, 4, 8, 16, 32)
DEFAULT_EPSILONS = (0.7, 0.9, 0.99)
ASSUMED_FRACTION = Fraction(1, 4)
"""Of each mode, where there are no spectra: what the cost model assumes."""


@dataclass(frozen=True)
class Option:
    """One method with its settings, for any number of layers and any batch."""

    method: str  #: One of :data:`analysis.steps.methods.METHODS`.
    settings: Settings = field(default_factory=Settings)
    epsilon: float | None = None  #: Energy threshold of the ranks, for methods that have ranks.
    fraction: Fraction | None = None  #: Of each mode, in place of ``epsilon``.
    directions: int | None = None  #: Of channels alone, in place of ``epsilon``.
    update: str = ""  #: Of a device program: after a ``batch`` or each ``image``; empty for a step of the library.

    @property
    def engine(self) -> str:
        """``library`` or ``device``."""
        return "device" if self.update else "library"

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
        return ", ".join(filter(None, (ranks, update, *(of.shown(getattr(self.settings, of.name)) for of in offered))))

    @property
    def name(self) -> str:
        """Method and settings."""
        return f"{self.method} {self.setting}".rstrip()


def options_for(
    methods: Sequence[str],
    epsilons: Sequence[float],
    fractions: Sequence[Fraction],
    grids: Mapping[str, Sequence[Any]] | None = None,
) -> list[Option]:
    """Every method with every one of its settings, in the order of the register.

    >>> [option.name for option in options_for(["int8", "lance"], [0.7], [Fraction(1, 2)])]
    ['int8', 'lance epsilon 0.7', 'lance ranks 0.5']
    """
    options: list[Option] = []
    for method in methods:
        entry = METHODS[method]
        tried = {of.name: (grids or {}).get(of.name, of.grid) for of in entry.settings if of.grid is not None}
        for values in product(*tried.values()):
            settings = Settings(**dict(zip(tried, values, strict=True)))
            if entry.ranks is None:
                options.append(Option(method, settings))
            else:
                options += [Option(method, settings, epsilon=epsilon) for epsilon in epsilons]
                options += [Option(method, settings, fraction=fraction) for fraction in fractions]
    return options


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
