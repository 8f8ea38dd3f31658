"""One training step of a PyTorch module: on shapes alone, or for real, and what is seen of it.

The module that is given stays as it is: a copy runs, without data where no numbers are needed, and random number
generators go on as if nothing had happened.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from analysis.steps.nets import RAISED, TORCH_HINT, CannotRunError, place, said_by
from analysis.torch_modules.inputs import Asked, Inputs
from analysis.torch_modules.losses import Loss, LossFunction, loss_of
from analysis.torch_modules.selection import described, freeze, training_layers, tune, weighted_layers
from analysis.torch_modules.step import LOSS, Layer, TorchStep

if TYPE_CHECKING:
    from analysis.torch_modules.watch import Watch

AUTOCAST = ("bfloat16", "float16")


@dataclass(frozen=True)
class Run:
    """How a module is run.

    Attributes
    ----------
    inputs : Asked
    loss : callable, optional
        From the output to one number; the default is that of :func:`analysis.torch_modules.losses.loss_of`.
    tune : str or sequence of str, optional
        Which layers train. Default: what the module itself says, by ``requires_grad``.
    freeze : tuple of str
        Globs of names of parameters that do not train, whatever else is said.
    autocast : str, optional
        Name of the dtype for ``torch.autocast``. Default: none.
    """

    inputs: Asked
    loss: LossFunction | None = None
    tune: str | Sequence[str] | None = None
    freeze: tuple[str, ...] = ()
    autocast: str | None = None


def check_torch() -> None:
    """Raise ImportError, in one line, where PyTorch is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise ImportError(TORCH_HINT)


def watched_step(module: Any, name: str, how: Run, real: bool = False) -> TorchStep:
    """What one training step keeps and computes.

    Parameters
    ----------
    module : torch.nn.Module
        In the mode, and with the gradients switched on, in which it is to train.
    name : str
        For messages.
    how : Run
    real : bool
        Whether numbers are computed: as much memory and time as a step takes. Default: shapes alone.

    Raises
    ------
    CannotRunError
        If the module does not run on these inputs.
    ValueError
        If nothing trains, or the output has no gradient.
    """
    check_torch()
    from analysis.torch_modules.watch import Watch

    with random_numbers_kept(), quiet():
        fake, own = copied(module, name, real)
        inputs, autocast = prepared(own, how, fake)
        trained = training_layers(own)
        if not any(parameter.requires_grad for parameter in own.parameters()):
            raise ValueError(f"net {name!r}: nothing trains, all of its parameters have requires_grad False")
        watch = Watch(own, trained, not real)
        with nullcontext() if fake is None else fake:
            with watch.forward(), autocast:
                loss = forward_and_loss(own, name, how, inputs, watch)
            with watch.backward():
                try:
                    loss.value.backward()
                except RAISED as error:
                    raise CannotRunError(f"net {name!r}: its backward pass raised {said_by(error)}") from None
    return _summary(own, how, inputs, watch, loss, trained)


def prepared(own: Any, how: Run, fake: Any = None) -> tuple[Inputs, AbstractContextManager[Any]]:
    """Make a copy of a module train as it was asked for; gives its inputs, and the context of its forward pass.

    ``fake`` is the ``FakeTensorMode`` in which the copy lives, if its tensors have no data.
    """
    import torch

    if how.tune is not None:
        tune(own, how.tune)
    freeze(own, how.freeze)
    inputs = how.inputs.tensors(own, fake)
    device = "cpu" if inputs.first is None else inputs.first.device.type
    dtype = None if how.autocast is None else getattr(torch, how.autocast)
    return inputs, nullcontext() if dtype is None else torch.autocast(device, dtype=dtype)


def forward_and_loss(own: Any, name: str, how: Run, inputs: Inputs, watch: Watch) -> Loss:
    """Run a copy on its inputs, and its loss; errors in words that help."""
    try:
        output = own(*inputs.args, **inputs.kwargs)
    except RAISED as error:  # a user's forward() may raise anything
        raise CannotRunError(_why(name, how.inputs, error)) from None
    try:
        with watch.inside(LOSS):
            return loss_of(output, how.inputs.batch, how.loss)
    except RAISED as error:
        words = str(error) if isinstance(error, ValueError) else said_by(error)
        raise ValueError(f"net {name!r}: {words}") from None


def _why(name: str, inputs: Asked, error: BaseException) -> str:
    """Why a module does not run; the errors of tensors without data in words that help."""
    from torch._subclasses import fake_tensor

    ran = f"net {name!r} cannot run on inputs {inputs}: "
    by_value = (fake_tensor.DataDependentOutputException, fake_tensor.DynamicOutputShapeException)
    if isinstance(error, by_value):
        return f"{ran}what it computes depends on the values of tensors ({error}), which shapes alone do not tell"
    return f"{ran}{said_by(error)}{place(error)}"


def copied(module: Any, name: str, real: bool) -> tuple[Any, Any]:
    """A ``FakeTensorMode`` with a copy of the module in it, or None with one that has numbers.

    Raises ValueError if it cannot be copied.
    """
    import torch

    module = getattr(module, "_orig_mod", module)  # of one that torch.compile made
    if isinstance(module, torch.jit.ScriptModule):
        raise ValueError(
            f"net {name!r} is compiled by TorchScript, expected the module that it was scripted or traced from"
        )
    if any(torch.nn.parameter.is_lazy(each) for each in (*module.parameters(), *module.buffers())):
        raise ValueError(f"net {name!r} has parameters that have no shape yet: run it once on an example before")
    try:
        if real:
            return None, copy.deepcopy(module, _computed(module, lambda tensor: tensor.clone()))
        from torch._subclasses.fake_tensor import FakeCopyMode, FakeTensorMode

        fake = FakeTensorMode(allow_non_fake_inputs=True)
        with FakeCopyMode(fake):
            own = copy.deepcopy(module, _computed(module, fake.from_tensor))
    except RAISED as error:
        raise ValueError(f"net {name!r} cannot be copied, and it is not to be changed: {said_by(error)}") from None
    for part in own.modules():  # an average over all batches counts them, and a count without a value divides nothing
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm) and part.momentum is None:
            part.momentum = 0.1
    return fake, own


def _computed(module: Any, copied: Callable[[Any], Any]) -> dict[int, Any]:
    """Copies of tensors that a module computed and remembers, which ``copy.deepcopy`` refuses, by identity."""
    import torch

    values = [value for part in module.modules() for value in vars(part).values() if isinstance(value, torch.Tensor)]
    return {id(value): copied(value.detach()) for value in values if not value.is_leaf}


@contextmanager
def quiet() -> Iterator[None]:
    """PyTorch does not log the errors that it raises."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


@contextmanager
def random_numbers_kept() -> Iterator[None]:
    """The generators of Python, NumPy and PyTorch afterwards as before."""
    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])  # noqa: NPY002
        torch.set_rng_state(states[2])


def _summary(own: Any, how: Run, inputs: Inputs, watch: Watch, loss: Any, trained: dict[str, Any]) -> TorchStep:
    modules = watch.modules()
    calls = {seen.path: seen.calls for seen in modules}
    layers: dict[str, Layer] = {}
    for path, layer in trained.items():
        if path in watch.itemsizes:
            layers[path] = described(path, layer, watch.shapes(path), calls[path], watch.itemsizes[path])
    names = list(weighted_layers(own))
    parameters = list(own.parameters())
    first = inputs.first
    kind = next((p.dtype for p in parameters if p.is_floating_point()), None)
    step = TorchStep(
        batch=how.inputs.batch,
        input_shape=() if first is None else tuple(int(n) for n in first.shape[1:]),
        classes=loss.classes,
        dtype=str(kind).removeprefix("torch."),
        loss=loss.words,
        modules=modules,
        layers=layers,
        head=names[-1] if names and names[-1] in layers else None,
        kept=watch.kept(),
        macs=dict(watch.macs),
        parameters=sum(p.numel() for p in parameters),
        trained_parameters=sum(p.numel() for p in parameters if p.requires_grad),
        uncounted=tuple(watch.uncounted),
    )
    aside = [path for path in trained if path not in layers]
    if aside:
        listed = ", ".join(aside[:4]) + (f" and {len(aside) - 4} more" if len(aside) > 4 else "")
        step = replace(step, remarks=(f"Layers that train and whose own forward() did not run: {listed}.",))
    return step
