"""What a method can be told, and what it makes of a step."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

    from analysis.peak.lifetimes import Lifetimes
    from lance_ref.engine.recording import OpRecord

Description = dict[str, Any]
"""What an activation store says about itself in a trace."""

Ranks = tuple[int | None, ...]


class NotApplicableError(ValueError):
    """A method that this net, or this step, does not allow; ``--method all`` leaves it out and says why."""


@dataclass(frozen=True)
class Setting:
    """A number that a method can be told: an option of every command, and an argument of :func:`analysis.cost`.

    Attributes
    ----------
    name : str
        As in Python; the option is ``--`` and the name with dashes.
    default : object
        None where the method finds its own value.
    check : callable
        From the text of the option to the value; raises :class:`argparse.ArgumentTypeError`. The types of
        :mod:`analysis.commands.cli`, such as ``count`` and ``share``, will do.
    help : str
        What it is, in a few words.
    grid : tuple, optional
        Values that the planner tries. Default: None, and the planner does not offer it.
    label : str
        How a plan shows a value, for instance ``"patch {}"``. Default: the name and the value.
    """

    name: str
    default: Any
    check: Callable[[str], Any]
    help: str
    grid: tuple[Any, ...] | None = None
    label: str = ""

    @property
    def option(self) -> str:
        """``--lora-rank`` of ``lora_rank``."""
        return f"--{self.name.replace('_', '-')}"

    def checked(self, value: Any) -> Any:
        """A value as the option would give it; ValueError where the option would be refused."""
        if value is None and self.default is None:
            return None
        try:
            if isinstance(value, bool):
                raise argparse.ArgumentTypeError(f"is {value!r}, expected a number")
            return self.check(str(value))
        except (argparse.ArgumentTypeError, ValueError) as error:
            raise ValueError(f"{self.name} {error}") from None

    def shown(self, value: Any) -> str:
        """A value in words; empty for None."""
        number = f"{value:g}" if isinstance(value, float) else value
        return "" if value is None else (self.label or f"{self.name.replace('_', ' ')} {{}}").format(number)


KNOWN: dict[str, Setting] = {}
"""The settings of all registered methods, by name: one name means one thing."""


class Settings:
    """A value for every setting of the registered methods.

    Parameters
    ----------
    **given
        By name. Default: each setting's own.

    Raises
    ------
    TypeError
        If no method has a setting of that name.
    ValueError
        If a setting cannot have that value.

    >>> Settings(patch=4).patch, Settings() == Settings(patch=2)
    (4, True)
    """

    def __init__(self, **given: Any) -> None:
        for name in given:
            if name not in KNOWN:
                raise TypeError(f"{name!r} is no setting of a method, expected one of {', '.join(KNOWN)}")
        self._given = {name: KNOWN[name].checked(value) for name, value in given.items()}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in KNOWN:
            raise AttributeError(f"no method has a setting {name!r}")
        return self._given.get(name, KNOWN[name].default)

    def of(self, names: Collection[str]) -> dict[str, Any]:
        """The settings of these names."""
        return {name: getattr(self, name) for name in KNOWN if name in names}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Settings) and self.of(KNOWN) == other.of(KNOWN)

    def __hash__(self) -> int:
        return hash(tuple(self.of(KNOWN).items()))

    def __repr__(self) -> str:
        return f"Settings({', '.join(f'{name}={value!r}' for name, value in self._given.items())})"


@dataclass(frozen=True)
class TunedLayer:
    """A layer for which a method makes an activation store.

    Attributes
    ----------
    shape : tuple of int
        Of its input, batch first.
    dtype : dtype
        Of its weight.
    ranks : tuple
        Rank of each mode, None for a mode that is left alone; empty for a method without ranks.
    rng : Generator
        For stores that begin with random numbers.
    """

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    ranks: Ranks
    settings: Settings
    rng: np.random.Generator


@dataclass(frozen=True)
class MethodStep:
    """The step of one method."""

    records: list[OpRecord]  #: Its stores included, the loss last.
    repeats: int = 1  #: How often the records run in one step.
    stores: Mapping[str, Description] = field(default_factory=dict)  #: Of the layers whose store is not the exact one.
    #: With which these stores are made, where they have ranks.
    ranks: Mapping[str, Ranks] = field(default_factory=dict)
    settings: Settings = field(default_factory=Settings)
    #: Settings as they turned out, for instance the number of images in a micro-batch.
    facts: Mapping[str, Any] = field(default_factory=dict)
    own_trace: bool = False  #: Whether the numbers of the values are those of a trace of its own.
    #: When its tensors are given back, where that is known and not as in the plain step.
    lifetimes: Lifetimes | None = None
