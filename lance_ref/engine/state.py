"""What the current thread is doing: gradients on or off, who listens, and which layer runs."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lance_ref.engine.autograd import Segment
    from lance_ref.engine.counting import MacCounter
    from lance_ref.nn.tracing import Recorder


class _State(threading.local):
    """Per-thread switches, read by the autograd, the trace and the counter of multiply-adds."""

    grad_enabled: bool = True
    recorder: Recorder | None = None
    counter: MacCounter | None = None
    segment: Segment | None = None  # what runs now will run again in the backward pass, and keeps nothing
    shapes_only: bool = False
    module_paths: dict[int, str] | None = None  # paths below the module that was called first
    path: str = ""  # dotted path of the module that runs, as in `named_modules()`
    kind: str = "forward"  # what multiply-adds are spent on, see counting.KINDS
    flagged: bool = False  # a product has raised a floating-point flag, deserved or not


state = _State()
