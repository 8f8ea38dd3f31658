"""The inputs of a PyTorch module: from shapes as they are written on the command line, or from an example."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from analysis.commands.cli import InputSpec, input_spec
from analysis.commands.names import shown

Spec = InputSpec | str | Sequence[int]


class Inputs(NamedTuple):
    """Arguments of ``forward``: those by position, and those by name."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @property
    def first(self) -> Any:
        """The first tensor; None where there is none."""
        return next(iter(leaves((self.args, self.kwargs))), None)


@dataclass(frozen=True)
class Asked:
    """Which inputs were asked for: an example, or shapes and a batch."""

    batch: int
    specs: tuple[InputSpec, ...] = ()
    example: Any = None

    @classmethod
    def of(cls, batch: int | None, specs: Sequence[InputSpec], example: Any, default_batch: int) -> Asked:
        """Raises ValueError for an example beside shapes, or of another batch than the one that was asked for."""
        if example is None:
            return cls(default_batch if batch is None else batch, tuple(specs))
        if specs:
            raise ValueError("an example (inputs) and input_shape are given, expected one of them")
        first = _in_order(example).first
        if first is None or not first.ndim:
            raise ValueError(f"inputs are {shown(example)}, expected a tensor with a batch, a tuple, or a dict of them")
        if batch is not None and batch != first.shape[0]:
            raise ValueError(f"batch is {batch}, but the example (inputs) has {first.shape[0]}")
        return cls(int(first.shape[0]), (), example)

    def tensors(self, module: Any, fake: Any = None) -> Inputs:
        """The inputs on the module's device: without data under a ``FakeTensorMode``, else numbers that any net takes.

        Floating numbers are normally distributed, integers 0 and so within every table, masks 1 but for the first
        sample's last place.
        """
        import torch

        if self.example is not None:
            made = _in_order(self.example)
            return Inputs(*_mapped((made.args, made.kwargs), fake.from_tensor if fake is not None else _copied))
        first = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(()))
        generator = torch.Generator().manual_seed(0)
        args, kwargs = [], {}
        for spec in self.specs:
            dtype = first.dtype if spec.dtype is None else getattr(torch, spec.dtype)
            shape = (self.batch, *spec.shape)
            if fake is not None:
                with fake:
                    tensor = torch.empty(shape, dtype=dtype, device=first.device)
            elif dtype.is_floating_point or dtype.is_complex:
                tensor = torch.randn(shape, dtype=torch.float32, generator=generator).to(first.device, dtype)
            else:
                is_mask = "mask" in (spec.name or "")
                tensor = torch.full(shape, int(is_mask), dtype=dtype, device=first.device)
                if is_mask and len(shape) > 1 and shape[-1] > 1:
                    tensor[0, ..., -1] = 0  # masks that hide nothing are taken away by some networks
            if spec.name is None:
                args.append(tensor)
            else:
                kwargs[spec.name] = tensor
        return Inputs(tuple(args), kwargs)

    def __str__(self) -> str:
        if self.example is not None:
            return "the example"
        return ", ".join(
            f"{f'{spec.name}=' if spec.name else ''}{(self.batch, *spec.shape)}{f':{spec.dtype}' if spec.dtype else ''}"
            for spec in self.specs
        )


def read_specs(given: Spec | Sequence[Spec] | None, image_size: int | None) -> tuple[InputSpec, ...]:
    """What ``input_shape`` says: one shape, or several, each as integers or as on the command line.

    By default one RGB image.

    Raises
    ------
    TypeError, ValueError
        If it is something else.

    Examples
    --------
    >>> read_specs((3, 32, 32), None)
    (InputSpec(name=None, shape=(3, 32, 32), dtype=None),)
    >>> [spec.name for spec in read_specs(["input_ids=128:int64", "attention_mask=128:int64"], None)]
    ['input_ids', 'attention_mask']
    """
    from numbers import Integral

    if given is None:
        size = 224 if image_size is None else image_size
        return (InputSpec(None, (3, size, size), None),)
    if image_size is not None:
        raise ValueError(f"image_size is {image_size} beside input_shape, expected one of them")
    if isinstance(given, (str, InputSpec)):
        given = [given]
    elif not isinstance(given, Sequence):
        raise TypeError(f"input_shape is {shown(given)}, a {type(given).__name__}, expected a sequence of integers")
    elif all(isinstance(each, Integral) for each in given):
        given = [tuple(int(n) for n in given)]  # type: ignore[arg-type]
    return tuple(_read(each) for each in given)


def _read(given: Any) -> InputSpec:
    from argparse import ArgumentTypeError
    from numbers import Integral

    if isinstance(given, InputSpec):
        return given
    if isinstance(given, str):
        try:
            return input_spec(given)
        except ArgumentTypeError as error:
            raise ValueError(f"input_shape {error}") from None
    if isinstance(given, Sequence) and all(isinstance(n, Integral) and int(n) > 0 for n in given):
        return InputSpec(None, tuple(int(n) for n in given), None)
    raise TypeError(f"input_shape is {shown(given)}, expected positive integers, or [name=]shape[:dtype]")


def _in_order(example: Any) -> Inputs:
    """An example as arguments: a dictionary names them, a tuple or list puts them in order, anything else is one."""
    if isinstance(example, Mapping):
        return Inputs((), dict(example))
    return Inputs(tuple(example) if isinstance(example, (tuple, list)) else (example,), {})


def _copied(tensor: Any) -> Any:
    """So that what a module does to its input is not done to the example."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)


def _mapped(value: Any, change: Any) -> Any:
    from torch import Tensor
    from torch.utils import _pytree

    return _pytree.tree_map_only(Tensor, change, value)


def leaves(value: Any) -> list[Any]:
    """All tensors in lists, tuples and dictionaries, in order."""
    from torch import Tensor
    from torch.utils import _pytree

    return [leaf for leaf in _pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
