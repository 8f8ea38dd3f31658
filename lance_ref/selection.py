"""Which layers train: the last n, all, the head alone, or those whose names match."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Sequence
from dataclasses import dataclass

from lance_ref import nn
from lance_ref.nn.module import Module

_SHOWN = 6  # layer names that an error lists


@dataclass(frozen=True)
class Tuning:
    """What :func:`tune` decided.

    Attributes
    ----------
    layers : tuple of str
        Paths of the Conv2d and Linear layers that train, in module order, without the head.
    head : str or None
        Path of the classifier head, which always trains; None if every layer stands in ``layers``.
    selection : str or tuple of str
        What was asked for.
    """

    layers: tuple[str, ...]
    head: str | None
    selection: str | tuple[str, ...]

    @property
    def trained(self) -> tuple[str, ...]:
        """``layers`` and the head."""
        return self.layers if self.head is None else (*self.layers, self.head)


def weighted_layers(net: Module) -> dict[str, Module]:
    """All Conv2d and Linear layers by path, in module order; the last one is the head."""
    return {path: module for path, module in net.named_modules() if isinstance(module, (nn.Conv2d, nn.Linear))}


def tune(net: Module, selection: str | Sequence[str] = "last:4", train_batchnorm: bool = False) -> Tuning:
    """Choose the layers that train, and freeze everything else.

    The selected layers and the head require gradients for weight and bias; every other parameter of
    the network does not. A layer below the first that trains therefore leaves nothing on the tape.

    Parameters
    ----------
    net : Module
        Changed in place: ``requires_grad`` of its parameters, ``frozen`` of its BatchNorm2d layers,
        and ``net.tuning``, which becomes the result.
    selection : str or sequence of str
        ``"last:4"``: the last four Conv2d and Linear layers in module order, the head not counted.
        ``"all"``: all of them. ``"head"``: none but the head. Anything else is a glob, or a list of
        them, matched against the layers' whole dotted paths (``*`` also matches dots).
    train_batchnorm : bool
        Whether the BatchNorm2d layers that come after the first selected layer, in module order,
        train as well and use the statistics of the batch. The others, and without this all of them,
        are frozen: they keep using their running statistics, in training mode too. (One that keeps no
        running statistics cannot be frozen; its weight and bias are.)

    Returns
    -------
    Tuning

    Raises
    ------
    ValueError
        If the network has no Conv2d or Linear layer, ``n`` is not a number from 1 to the number of
        layers, or a glob matches nothing.

    Notes
    -----
    The head is the last Conv2d or Linear layer in the order of ``named_modules()``, which is the
    order of registration. A layer that shares its weight with a selected one trains with it, and is
    listed as well.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> tune(net, "last:1")
    Tuning(layers=('2',), head='4', selection='last:1')
    >>> [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    ['2.weight', '2.bias', '4.weight', '4.bias']
    """
    if not isinstance(net, Module):
        raise TypeError(f"net is a {type(net).__name__}, expected a lance_ref.nn.Module")
    modules = weighted_layers(net)
    if not modules:
        raise ValueError(f"net has no Conv2d or Linear layer to tune, it is a {type(net).__name__}")
    *body, head = modules
    chosen = {*_select(body, head, selection), head}

    net.requires_grad_(False)
    for path in chosen:
        modules[path].requires_grad_()
    layers = tuple(path for path in body if modules[path].weight.requires_grad)
    _freeze_batchnorm(net, layers[0] if layers and train_batchnorm else None)
    tuning = Tuning(layers, head, selection if isinstance(selection, str) else tuple(selection))
    net.tuning = tuning
    return tuning


def _freeze_batchnorm(net: Module, first: str | None) -> None:
    """Freeze every BatchNorm2d, except those after the layer at path ``first``."""
    below = True
    for path, module in net.named_modules():
        below = below and (first is None or path != first)
        if isinstance(module, nn.BatchNorm2d):
            module.frozen = below and module.track_running_stats
            module.requires_grad_(not below)


def _select(body: list[str], head: str, selection: str | Sequence[str]) -> list[str]:
    """Paths of the selected layers; ``body`` is all layers but the head."""
    if selection == "all":
        return body
    if selection == "head":
        return []
    if isinstance(selection, str) and selection.startswith("last:"):
        return body[-_last_count(selection, len(body)) :]
    globs = [selection] if isinstance(selection, str) else list(selection)
    if not globs or not all(isinstance(glob, str) and glob for glob in globs):
        raise ValueError(f"selection is {_shown(selection)}, expected 'last:n', 'all', 'head', a glob or several globs")
    selected: set[str] = set()
    for glob in globs:
        matches = [path for path in (*body, head) if fnmatch.fnmatchcase(path, glob)]
        if not matches:
            raise ValueError(_no_match(glob, [*body, head]))
        selected.update(matches)
    return [path for path in body if path in selected]


def _last_count(selection: str, available: int) -> int:
    text = selection.removeprefix("last:")
    allowed = f"expected last:n with n from 1 to {available}, the Conv2d and Linear layers besides the head"
    if available == 0:
        allowed = "but the only Conv2d or Linear layer of this net is its head; expected 'head'"
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"selection is {_shown(selection)}, {allowed}")
    # a number of thousands of digits is out of range too, and int() would refuse to read it
    count = int(text) if len(text) < 10 else available + 1
    if not 1 <= count <= available:
        raise ValueError(f"selection is {_shown(selection)}, {allowed}")
    return count


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _no_match(glob: str, paths: list[str]) -> str:
    near = difflib.get_close_matches(glob, paths, n=_SHOWN, cutoff=0.5)
    under = [path for path in paths if path.startswith(f"{glob}.")]
    nothing = f"selection {_shown(glob)} matches no Conv2d or Linear layer"
    if under:
        return f"{nothing}; for those inside it write '{glob}.*'"
    if near:
        return f"{nothing}; the nearest are {', '.join(near)}"
    shown = ", ".join(paths[-_SHOWN:])
    more = f" (and {len(paths) - _SHOWN} before them)" if len(paths) > _SHOWN else ""
    return f"{nothing}; expected 'last:n', 'all', 'head' or a glob of {shown}{more}"
