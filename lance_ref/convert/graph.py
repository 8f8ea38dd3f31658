"""A network that runs the steps of a traced graph, with the layers in the places in which they were."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from lance_ref.convert.functions import FUNCTIONS
from lance_ref.nn.module import Module


class Ref(NamedTuple):
    """The result of an earlier step, by its number; -1 is the input."""

    number: int


class Step(NamedTuple):
    """One step: a layer at a path, a function of the table, or a parameter at a path.

    ``done`` are results that no later step needs.
    """

    kind: str  #: "layer", "function" or "parameter".
    target: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    done: tuple[int, ...] = ()


class Graph(Module):
    """The steps in order; children are registered under the paths that they have in PyTorch's module."""

    def __init__(self, name: str, steps: Sequence[Step], result: Any) -> None:
        super().__init__()
        self.name, self.steps, self.result = name, tuple(steps), result

    def forward(self, x: Any) -> Any:
        found: dict[int, Any] = {-1: x}
        del x
        for number, step in enumerate(self.steps):
            args, kwargs = filled(step.args, found), filled(step.kwargs, found)
            if step.kind == "layer":
                found[number] = self.get_submodule(step.target)(*args, **kwargs)
            elif step.kind == "function":
                found[number] = FUNCTIONS[step.target](*args, **kwargs)
            else:
                path, _, name = step.target.rpartition(".")
                found[number] = getattr(self.get_submodule(path), name)
            del args, kwargs  # what no later step needs, nor the tape, is given back here
            for each in step.done:
                del found[each]
        return filled(self.result, found)

    def extra_repr(self) -> str:
        return f"{self.name}, {len(self.steps)} steps"


class Part(Module):
    """A place in the tree of layers, which runs nothing of its own."""


def filled(value: Any, found: dict[int, Any]) -> Any:
    """A value with results in place of their numbers, in tuples, lists, dictionaries and slices too."""
    if isinstance(value, Ref):
        return found[value.number]
    if isinstance(value, (tuple, list)):
        return type(value)(filled(each, found) for each in value)
    if isinstance(value, dict):
        return {name: filled(each, found) for name, each in value.items()}
    if isinstance(value, slice):
        return slice(filled(value.start, found), filled(value.stop, found), filled(value.step, found))
    return value


def refs_in(value: Any) -> set[int]:
    """Numbers of the results that a value refers to."""
    if isinstance(value, Ref):
        return {value.number}
    if isinstance(value, (tuple, list)):
        return set().union(*(refs_in(each) for each in value))
    if isinstance(value, dict):
        return refs_in(list(value.values()))
    return refs_in([value.start, value.stop, value.step]) if isinstance(value, slice) else set()


def with_ends(steps: Sequence[Step], result: Any) -> list[Step]:
    """The same steps, each with the results that are needed for the last time there."""
    later, ended = refs_in(result), []
    for number in range(len(steps) - 1, -1, -1):
        step = steps[number]
        used = refs_in([step.args, step.kwargs]) | {number}
        ended.append(step._replace(done=tuple(sorted(used - later))))
        later |= used
    return ended[::-1]
