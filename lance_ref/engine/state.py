"""What the current thread is doing: gradients on or off, who listens, and which layer runs.

Everything in ``engine`` reads this module, so it imports none of them: who listens is described by what it can do.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, MutableMapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol


class Listener(Protocol):
    """Takes note of every executed operation; see :class:`lance_ref.engine.recording.Recorder`."""

    records: list[Any]

    def value(self, tensor: Any) -> Any: ...

    def aside(self) -> AbstractContextManager[list[Any]]: ...

    def add(self, op: str, inputs: Sequence[Any], attributes: Mapping[str, Any], output: Any) -> None: ...


class Counter(Protocol):
    """Adds up executed multiply-adds by layer path and kind; see :class:`lance_ref.engine.counting.MacCounter`."""

    macs: MutableMapping[tuple[str, str], int]


class Stretch(Protocol):
    """A stretch of computation that runs again in the backward pass; see :class:`lance_ref.engine.autograd.Segment`."""

    dropped: Any
    draws: Any

    def read(self, inputs: tuple[Any, ...]) -> None: ...


class Postponement(Protocol):
    """Takes operations that may run later, together; see :class:`lance_ref.fused.deferral.Deferral`."""

    def take(self, function: Any, inputs: tuple[Any, ...], attributes: dict[str, Any], shape: Any) -> Any: ...

    def compute(self) -> None: ...


class _State(threading.local):
    """Per-thread switches, read by the autograd, the trace and the counter of multiply-adds."""

    grad_enabled: bool = True
    recorder: Listener | None = None
    counter: Counter | None = None
    segment: Stretch | None = None  # what runs now will run again in the backward pass, and keeps nothing
    deferral: Postponement | None = None  # takes what runs without gradients
    shapes_only: bool = False
    module_paths: dict[int, str] | None = None  # paths below the module that was called first
    path: str = ""  # dotted path of the module that runs, as in `named_modules()`
    kind: str = "forward"  # what multiply-adds are spent on, see counting.KINDS
    flagged: bool = False  # a product has raised a floating-point flag, deserved or not


state = _State()
