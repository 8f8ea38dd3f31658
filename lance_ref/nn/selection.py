"""Which layers train: the last n, all, the head alone, or those whose names match."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lance_ref import nn
from lance_ref.engine.tensor import Shape
from lance_ref.nn.module import Module, Parameter

PARAMETERS = ("all", "bias")
_SHOWN = 6  # layer names, or shapes, that an error lists


@dataclass(frozen=True)
class Tuning:
    """The choice that :func:`tune` made."""

    layers: tuple[
        str, ...
    ]  #: Paths of the convolutions and linear layers that train, in module order, without the head.
    head: str | None  #: Path of the classifier head, which always trains; None if every layer stands in ``layers``.
    selection: str | tuple[str, ...]  #: What was asked for.
    parameters: str = "all"  #: "all", or "bias": of ``layers`` the biases alone.

    @property
    def trained(self) -> tuple[str, ...]:
        """``layers`` and the head."""
        return self.layers if self.head is None else (*self.layers, self.head)


def weighted_layers(net: Module) -> dict[str, Module]:
    """All convolutions and linear layers by path, in module order; the last one is the head."""
    return {path: module for path, module in net.named_modules() if isinstance(module, (nn.Convolution, nn.Linear))}


def refuse_updates(net: Module, what: str) -> None:
    """Raise ValueError if a layer trains in a subspace, which ``what`` does not heed."""
    for path, layer in weighted_layers(net).items():
        if layer.update is not None:
            raise ValueError(f"layer {path!r} trains in a subspace, which {what} does not heed; merge(net) first")


def learns(layer: Module) -> bool:
    """Whether the weight of a layer trains, as a whole or in a subspace."""
    return bool(layer.weight.requires_grad or getattr(layer, "update", None) is not None)


def tune(
    net: Module,
    selection: str | Sequence[str] = "last:4",
    train_batchnorm: bool = False,
    parameters: str = "all",
) -> Tuning:
    """Choose the layers that train, and freeze everything else.

    The selected layers and the head require gradients for weight and bias, or, with
    ``parameters="bias"``, the selected layers for the bias and the head for both; every other parameter of
    the network does not. A layer below the first that trains therefore leaves nothing on the tape.

    Parameters
    ----------
    net : Module
        Changed in place: ``requires_grad`` of its parameters, ``frozen`` of its BatchNorm2d layers,
        and ``net.tuning``, which becomes the result.
    selection : str or sequence of str
        ``"last:4"``: the last four convolutions and linear layers in module order, the head not counted.
        ``"all"``: all of them. ``"head"``: none but the head. Anything else is a glob, or a list of
        them, matched against the layers' whole dotted paths (``*`` also matches dots). ``"all"`` is refused
        where a module says, by an attribute ``stored_weights``, that it multiplies with others beside.
    train_batchnorm : bool
        Whether the BatchNorm2d layers that come after the first selected layer, in module order,
        train as well and use the statistics of the batch. The others, and without this all of them,
        are frozen: they keep using their running statistics, in training mode too. (One that keeps no
        running statistics cannot be frozen; its weight and bias are.)
    parameters : {"all", "bias"}
        ``"bias"``: of the selected layers the biases alone (TinyTL, Cai et al. 2020, arXiv 2007.11622). Their
        gradients are sums of output gradients, so that nothing of the activation is kept. A layer
        without a bias of its own trains that of the BatchNorm2d behind it, the next in module order before
        another layer, which adds to the same channels. Batch norm stays frozen then, as its
        statistics would keep activations; ``train_batchnorm`` has the biases of all batch norms after
        the first selected layer train.

    Raises
    ------
    ValueError
        If the network has no convolution or linear layer, ``n`` is not a number from 1 to the number of
        layers, a glob matches nothing, or a selected layer has no bias where only biases are to train; or if it
        keeps layers that require gradients in a plain list, tuple or dict, which registers none of them; or if a
        layer trains in a subspace.

    Notes
    -----
    The head is the last convolution or linear layer in the order of ``named_modules()``, which is the
    order of registration. A layer that shares its weight (with ``parameters="bias"``, its bias) with a
    selected one trains with it, and is listed as well.

    Where only biases train there is no activation to compress: :func:`lance_ref.calibrate` says so, and
    a compressed layer (:func:`lance_ref.compress`) never comes to use its store. In PyTorch training biases alone
    frees little: its convolution and batch norm keep their input whenever backward comes through.

    Examples
    --------
    >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    >>> tune(net, "last:1")
    Tuning(layers=('2',), head='4', selection='last:1', parameters='all')
    >>> [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    ['2.weight', '2.bias', '4.weight', '4.bias']
    >>> tune(net, "last:1", parameters="bias").layers
    ('2',)
    >>> [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    ['2.bias', '4.weight', '4.bias']
    """
    choice = choose(net, selection, train_batchnorm, parameters)
    refuse_updates(net, "tune")
    _check_containers(net)
    for parameter in net.parameters():
        parameter.requires_grad_(id(parameter) in choice.trains)
    for module, frozen in choice.frozen:
        module.frozen = frozen
    net.tuning = choice.tuning
    return choice.tuning


class Choice(NamedTuple):
    """What :func:`tune` would do to a net."""

    tuning: Tuning
    trains: set[int]  #: Identities of the parameters that train; no other does.
    frozen: list[tuple[nn.BatchNorm2d, bool]]  #: Whether each of the net is frozen.


def choose(
    net: Module,
    selection: str | Sequence[str] = "last:4",
    train_batchnorm: bool = False,
    parameters: str = "all",
) -> Choice:
    """The choice that :func:`tune` would make; the net is not changed."""
    if not isinstance(net, Module):
        raise TypeError(f"net is a {type(net).__name__}, expected a lance_ref.nn.Module")
    if parameters not in PARAMETERS:
        raise ValueError(f"parameters is {parameters!r}, expected one of {', '.join(PARAMETERS)}")
    modules = weighted_layers(net)
    if not modules:
        _check_containers(net)
        raise ValueError(f"net has no convolution or linear layer to tune, it is a {type(net).__name__}")
    *body, head = modules
    selected = select_paths(body, head, selection)
    gradients = {path: module.weight for path, module in modules.items()} if parameters == "all" else _biases(net)
    without = [path for path in selected if gradients[path] is None]
    if without:
        raise ValueError(
            f"parameters is 'bias', but layer {without[0]!r} has no bias, nor has a BatchNorm2d behind it"
            + (f"; nor have {len(without) - 1} others" if len(without) > 1 else "")
        )

    trains = {id(parameter) for parameter in modules[head].parameters()}
    for path in selected:
        trains |= {id(each) for each in modules[path].parameters()} if parameters == "all" else {id(gradients[path])}
    if selection == "all" and parameters == "all":
        _check_products(net, trains)
    layers = tuple(path for path in body if id(gradients[path]) in trains)
    first = layers[0] if layers and train_batchnorm else None
    frozen = _choose_batchnorm(net, first, parameters, trains)
    asked = selection if isinstance(selection, str) else tuple(selection)
    return Choice(Tuning(layers, head, asked, parameters), trains, frozen)


def _check_products(net: Module, trains: set[int]) -> None:
    """Raise ValueError for stored weights that the net multiplies with outside of its layers, if they do not train."""
    for path, module in net.named_modules():
        frozen = [p.shape for p in getattr(module, "stored_weights", ()) if id(p) not in trains]
        if frozen:
            raise ValueError(
                f"selection is 'all', but {path!r} multiplies with a stored weight of shape {frozen[0]}, which belongs "
                "to no convolution or linear layer and would stay frozen; expected last:n, or globs of layer names"
            )


def not_registered(shapes: Sequence[Shape]) -> str:
    """What an error says of parameters that ``net.parameters()`` does not give, although they require gradients."""
    listed = ", ".join("x".join(map(str, shape)) or "one number" for shape in shapes[:_SHOWN])
    more = f" and {len(shapes) - _SHOWN} more" if len(shapes) > _SHOWN else ""
    count = f"{len(shapes)} parameter{'' if len(shapes) == 1 else 's'}"
    return (
        f"{count} ({listed}{more}) that net.parameters() does not give, so that nothing trains them: assign each layer "
        "to an attribute or put them into nn.Sequential (those that are to stay as they are: requires_grad_(False))"
    )


def _check_containers(net: Module) -> None:
    """Raise ValueError for layers in a plain list, tuple or dict, unless the net has them, or they are frozen."""
    known = {id(parameter) for parameter in net.parameters()}
    for path, module in net.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, (list, tuple, dict)) and name not in _REGISTRIES:
                stray = {id(p): p.shape for p in _parameters_in(value) if p.requires_grad and id(p) not in known}
                if stray:
                    place = f"{path}.{name}" if path else name
                    words = not_registered(list(stray.values()))
                    raise ValueError(f"{place} of the {type(net).__name__} is a {type(value).__name__} with {words}")


_REGISTRIES = frozenset(vars(Module()))
"""What every module keeps of its own."""


def _parameters_in(container: Any) -> Iterator[Parameter]:
    for item in container.values() if isinstance(container, dict) else container:
        if isinstance(item, Module):
            yield from item.parameters()
        elif isinstance(item, Parameter):
            yield item


def _biases(net: Module) -> dict[str, Any]:
    """The bias of every convolution and linear layer, or that of the batch norm behind it, or None."""
    biases: dict[str, Any] = {}
    latest = ""
    for path, module in net.named_modules():
        if isinstance(module, (nn.Convolution, nn.Linear)):
            biases[path], latest = module.bias, path
            channels = module.out_channels if isinstance(module, nn.Convolution) else module.out_features
        elif isinstance(module, nn.BatchNorm2d) and latest:
            if biases[latest] is None and module.num_features == channels:
                biases[latest] = module.bias
            latest = ""
    return biases


def _choose_batchnorm(
    net: Module, first: str | None, parameters: str, trains: set[int]
) -> list[tuple[nn.BatchNorm2d, bool]]:
    """Every BatchNorm2d is frozen, except those after the layer at path ``first``; of these the bias alone may train.

    What trains of them is put into ``trains``, what does not is taken out.
    """
    frozen = []
    below = True
    for path, module in net.named_modules():
        below = below and (first is None or path != first)
        if not isinstance(module, nn.BatchNorm2d):
            continue
        if parameters == "all":
            frozen.append((module, below and module.track_running_stats))
            own = {id(parameter) for parameter in (module.weight, module.bias) if parameter is not None}
            trains.difference_update(own) if below else trains.update(own)
        else:
            frozen.append((module, module.track_running_stats))
            if not below and module.bias is not None:
                trains.add(id(module.bias))
    return frozen


def select_paths(body: list[str], head: str, selection: str | Sequence[str]) -> list[str]:
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
    allowed = f"expected last:n with n from 1 to {available}, the convolutions and linear layers besides the head"
    if available == 0:
        allowed = "but the only convolution or linear layer of this net is its head; expected 'head'"
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
    nothing = f"selection {_shown(glob)} matches no convolution or linear layer"
    if under:
        return f"{nothing}; for those inside it write '{glob}.*'"
    if near:
        return f"{nothing}; the nearest are {', '.join(near)}"
    shown = ", ".join(paths[-_SHOWN:])
    more = f" (and {len(paths) - _SHOWN} before them)" if len(paths) > _SHOWN else ""
    return f"{nothing}; expected 'last:n', 'all', 'head' or a glob of {shown}{more}"
