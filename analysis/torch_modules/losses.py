"""The loss of a step: the user's function, the one that the module returned, cross-entropy, or the outputs' sum."""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

LossFunction = Callable[[Any], Any]


class Loss(NamedTuple):
    """A number to differentiate, what it is in words, and the number of classes if the output has classes."""

    value: Any
    words: str
    classes: int | None


def loss_of(output: Any, batch: int, function: LossFunction | None = None) -> Loss:
    """The loss of what a module returned.

    Parameters
    ----------
    output : object
        A tensor; tensors in tuples, lists, dictionaries or dataclasses.
    batch : int
        A tensor (batch, classes) of at least two classes is scored by cross-entropy.
    function : callable, optional
        From the output to one number; with it nothing else is looked at. Default: the output's own ``loss`` if it is a
        mapping with one; else its ``logits`` if it has them, in place of all that it holds; then cross-entropy of a
        (batch, classes) tensor; else the sum of all floating numbers that have a gradient.

    Raises
    ------
    ValueError
        If nothing has a gradient, or the function gives no number.
    """
    import torch
    from torch.nn import functional as F

    if function is not None:
        value = function(output)
        if not isinstance(value, torch.Tensor) or value.numel() != 1:
            came = (
                f"a tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else type(value).__name__
            )
            raise ValueError(f"the loss function gave {came}, expected one number")
        return _checked(value, f"Loss: {getattr(function, '__name__', 'the given function')}", _classes(output, batch))
    where = "the output"
    if isinstance(output, Mapping):
        if isinstance(output.get("loss"), torch.Tensor):
            return _checked(output["loss"], "Loss: the one that the module returned", None)
        if isinstance(output.get("logits"), torch.Tensor):
            output, where = output["logits"], "the output's logits"
    classes = _classes(output, batch)
    if classes is not None:
        labels = torch.zeros(batch, dtype=torch.int64, device=output.device)
        return _checked(F.cross_entropy(output, labels), f"Loss: cross-entropy of {where}", classes)
    found = [each for each in _outputs(output) if each.is_floating_point() and each.requires_grad]
    if not found:
        raise ValueError("the output has no floating numbers with a gradient, so that nothing can be trained by it")
    value = sum((each.sum() for each in found[1:]), found[0].sum())
    what = where if len(found) == 1 else f"all {len(found)} tensors of {where}"
    return _checked(value, f"Loss: the sum of {what}", None)


def _classes(output: Any, batch: int) -> int | None:
    """Of a tensor (batch, classes) of floating numbers."""
    import torch

    if isinstance(output, torch.Tensor) and output.ndim == 2 and output.is_floating_point():
        rows, columns = output.shape
        return int(columns) if rows == batch and columns > 1 else None
    return None


def _checked(value: Any, words: str, classes: int | None) -> Loss:
    if not value.requires_grad:
        raise ValueError("the loss has no gradient: no parameter that it depends on trains")
    return Loss(value, words, classes)


def _outputs(output: Any) -> list[Any]:
    """All tensors of an output, each once."""
    import torch
    from torch.utils import _pytree

    found: dict[int, Any] = {}
    pending = [output]
    while pending:
        each = pending.pop(0)
        if isinstance(each, torch.Tensor):
            found.setdefault(id(each), each)
        elif dataclasses.is_dataclass(each) and not isinstance(each, type):
            pending += [getattr(each, field.name) for field in dataclasses.fields(each)]
        elif isinstance(each, Mapping):
            pending += list(each.values())
        else:
            leaves = _pytree.tree_leaves(each)
            pending += [leaf for leaf in leaves if leaf is not each]
    return list(found.values())


def load_loss(name: str) -> LossFunction:
    """The function that ``--loss pkg.module:function`` names.

    Raises ValueError if there is none of that name.
    """
    module, _, function = name.partition(":")
    if not module or not function:
        raise ValueError(f"--loss is {name!r}, expected pkg.module:function")
    try:
        found: Any = importlib.import_module(module)
        for part in function.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, SyntaxError) as error:
        raise ValueError(f"--loss {name!r} cannot be imported: {error}") from None
    if not callable(found):
        raise ValueError(f"--loss {name!r} is a {type(found).__name__}, expected a function of the output")
    loss: LossFunction = found
    return loss
