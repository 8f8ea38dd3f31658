"""What this library's tape keeps of the step of a PyTorch module: predicted from shapes, and in a real step.

The step is translated function by function (:mod:`analysis.torch_modules.translate`); what its operations keep is said
by their cost rules.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from analysis.rules.account import WEIGHTED
from analysis.rules.layouts import Memory, backward_reaches
from analysis.rules.layouts import Storage as Block
from analysis.rules.op_cost import MissingRuleError, cost_of
from analysis.steps.nets import CannotRunError
from analysis.torch_modules.run import Run, copied, forward_and_loss, prepared, quiet, random_numbers_kept
from analysis.torch_modules.step import Storage, TorchStep
from analysis.torch_modules.translate import Translation, TranslationError
from lance_ref.engine.recording import OpRecord, Value

if TYPE_CHECKING:
    from analysis.torch_modules.translate import Stores
    from lance_ref.engine.tensor import Tensor


def with_tape(step: TorchStep, module: Any, name: str, how: Run) -> TorchStep:
    """The same step with what our tape keeps of it, or why there is no such tape."""
    try:
        translation, _, loss = _translated(module, name, how, False)
        return replace(step, tape=kept_of(translation.records, translation.value_of(loss)))
    except (CannotRunError, TranslationError, MissingRuleError) as error:
        return replace(step, no_tape=str(error))


class RealStep(NamedTuple):
    """A forward pass with numbers, in PyTorch and by this library's operations."""

    loss: Tensor  #: Ours: its tape is there to be measured.
    torch_loss: Any
    parameters: dict[str, tuple[Tensor, Any]]  #: Ours and PyTorch's, by name.


def real_step(module: Any, name: str, how: Run, stores: Stores | None = None) -> RealStep:
    """Run a module for real, with our operations beside PyTorch's, and with these stores for the inputs of layers.

    Raises TranslationError where the step cannot be translated.
    """
    translation, own, loss = _translated(module, name, how, True, stores)
    return RealStep(translation.of(loss), loss, {path: (translation.of(p), p) for path, p in own.named_parameters()})


def _translated(
    module: Any, name: str, how: Run, real: bool, stores: Stores | None = None
) -> tuple[Translation, Any, Any]:
    from analysis.torch_modules.inputs import leaves
    from analysis.torch_modules.watch import Watch

    if how.autocast is not None:
        raise TranslationError(f"torch.autocast computes in {how.autocast}, which this library does not have")
    with random_numbers_kept(), quiet():
        fake, own = copied(module, name, real)
        inputs, _ = prepared(own, how, fake)
        watch = Watch(own, (), not real)
        with nullcontext() if fake is None else fake:
            translation = Translation(own, leaves((inputs.args, inputs.kwargs)), watch, real, stores)
            with watch.forward(), translation.listening():
                loss = forward_and_loss(own, name, how, inputs, watch).value
    if translation.missing:
        raise TranslationError(translation.why_not())
    return translation, own, loss


def kept_of(records: Sequence[OpRecord], loss: Value) -> tuple[Storage, ...]:
    """Every storage that the tape keeps of these records, parameters left out, in order of the first to keep it.

    Raises :class:`analysis.rules.op_cost.MissingRuleError` for an operation without a rule.
    """
    memory = Memory()
    holders: dict[Block, list[tuple[str, bool]]] = {}
    for record, on_tape in zip(records, backward_reaches(records, loss), strict=True):
        for saved in cost_of(record, memory, on_tape).tape:
            if not saved.storage.is_parameter:
                holder = record.path, record.op in WEIGHTED and saved.what == "activation"
                of = holders.setdefault(saved.storage, [])
                of += [holder] * (holder not in of)
    return tuple(Storage(block.nbytes, tuple(of)) for block, of in holders.items())
