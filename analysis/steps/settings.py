"""What a method can be told, and what it makes of a step."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from analysis.peak.lifetimes import Lifetimes
    from lance_ref.engine.recording import OpRecord

Description = dict[str, Any]
"""What an activation store says about itself in a trace."""


class NotApplicableError(ValueError):
    """A method that this net, or this step, does not allow; ``--method all`` leaves it out and says why."""


@dataclass(frozen=True)
class Settings:
    """What the methods can be told.

    Attributes
    ----------
    patch : int
        Places of the output map, in each direction, that the gradient filter takes together.
    ratio : float
        Directions of a sketch by images of a batch.
    segments : int, optional
        Of checkpointing: into how many segments the stages from the first that trains to the last but one are put
        together; by default each of them that trains is a segment.
    micro_batch : int, optional
        Images that run at a time, a divisor of the batch; by default the largest up to a quarter of it.
    lora_rank : int
    calibration_batches : int
        From which LANCE's subspaces are found.
    """

    patch: int = 2
    ratio: float = 1 / 8
    segments: int | None = None
    micro_batch: int | None = None
    lora_rank: int = 4
    calibration_batches: int = 100

    def __post_init__(self) -> None:
        for name in ("patch", "segments", "micro_batch", "lora_rank", "calibration_batches"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}, expected a positive integer")
        if not 0 < self.ratio <= 1:
            raise ValueError(f"ratio is {self.ratio}, expected a number in (0, 1]")

    def of(self, names: Collection[str]) -> dict[str, Any]:
        """The settings of these names."""
        return {name: value for name, value in asdict(self).items() if name in names}


@dataclass(frozen=True)
class MethodStep:
    """The step of one method.

    Attributes
    ----------
    records : list of OpRecord
        Its stores included, the loss last.
    repeats : int
        How often the records run in one step.
    stores : mapping of layer path to description
        Of the layers whose store is not the exact one.
    facts : mapping
        Settings as they turned out, for instance the number of images in a micro-batch.
    own_trace : bool
        Whether the numbers of the values are those of a trace of its own.
    lifetimes : Lifetimes, optional
        When its tensors are given back, where that is known and not as in the plain step.
    """

    records: list[OpRecord]
    repeats: int = 1
    stores: Mapping[str, Description] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)
    own_trace: bool = False
    lifetimes: Lifetimes | None = None
