"""Checkpoints: everything the next training step depends on, in one ``.npz`` file without pickles.

That is the network's parameters and buffers, the state of the optimiser, of the schedule and of the
layers' activation stores, and of every random generator the network draws from. A description of the
network lies beside them, so that a checkpoint of another network, or of another run, is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from glob import escape
from pathlib import Path
from typing import Any

import numpy as np

from lance_ref.engine.random import as_generator
from lance_ref.io.npz import load_npz, save_npz
from lance_ref.nn.module import Module
from lance_ref.nn.selection import weighted_layers
from lance_ref.optim import LRScheduler, Optimizer
from lance_ref.stores import ActivationStore

FORMAT = 1
VARYING = ("ranks", "shape", "selected")  # in what a store says of itself after a step

_BROKEN = (KeyError, TypeError, ValueError, AttributeError, OverflowError)


def save(
    path: str | os.PathLike[str],
    net: Module,
    optimizer: Optimizer | None = None,
    scheduler: LRScheduler | None = None,
    *,
    meta: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write a checkpoint, all or nothing: the file of that name is the earlier one until the new one is complete.

    Parameters
    ----------
    path : path
        Taken as it is; its folder must exist.
    net : Module
    optimizer : Optimizer, optional
    scheduler : LRScheduler, optional
    meta : mapping, optional
        What :func:`load` is to return, such as the step and the history; finite numbers, text, lists and mappings.
    settings : mapping, optional
        Of the run, likewise; :func:`load` refuses a checkpoint with others.

    Raises
    ------
    ValueError, TypeError
        If ``meta`` or ``settings`` cannot be written as JSON.
    OSError
        If the file cannot be written, a full disk included. The earlier checkpoint is as it was, and
        nothing is left of the new one.

    Examples
    --------
    >>> import tempfile
    >>> from lance_ref import nn, optim
    >>> net = nn.Linear(2, 1, rng=0)
    >>> sgd = optim.SGD(net.parameters(), lr=0.1)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     save(f"{folder}/run.npz", net, sgd, meta={"step": 7})
    ...     before = net.weight.data
    ...     net.weight.data = 0 * before
    ...     print(load(f"{folder}/run.npz", net, sgd), np.array_equal(net.weight.data, before))
    {'step': 7} True
    """
    arrays, randomness = _collect(net, optimizer, scheduler)
    about = {
        "format": FORMAT,
        "description": describe(net, optimizer, scheduler),
        "settings": dict(settings or {}),
        "generators": randomness,
        "meta": dict(meta or {}),
    }
    text = json.dumps(about, allow_nan=False).encode()
    try:
        save_npz(path, {"about": np.frombuffer(text, np.uint8), **arrays})
    except OSError as error:
        reason = f"the checkpoint was not written ({error.strerror or error}); an earlier one is as it was"
        raise OSError(error.errno, reason, str(path)) from error


def load(
    path: str | os.PathLike[str],
    net: Module,
    optimizer: Optimizer | None = None,
    scheduler: LRScheduler | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Put network, optimiser, schedule, stores and random generators into the state that :func:`save` wrote.

    Parameters
    ----------
    path : path
    net, optimizer, scheduler
        Made as they were for the run that wrote the checkpoint. Changed in place, the generators that the
        network draws from and the library's default generator included.
    settings : mapping, optional
        Must be those given to :func:`save`.

    Returns
    -------
    dict
        ``meta`` of :func:`save`.

    Raises
    ------
    ValueError
        One line: the file is damaged or no checkpoint, or belongs to another network or other settings; then
        the line names the first difference. Nothing has been changed.
    OSError
        If the file cannot be opened.
    """
    arrays = load_npz(path)
    about = _about(path, arrays)
    for name, own in (("description", describe(net, optimizer, scheduler)), ("settings", dict(settings or {}))):
        _compare(path, about[name], json.loads(json.dumps(own)))
    earlier = _collect(net, optimizer, scheduler)
    try:
        _restore(arrays, about["generators"], net, optimizer, scheduler)
    except _BROKEN as error:
        _restore(*earlier, net, optimizer, scheduler)
        raise ValueError(f"{path}: the checkpoint does not fit: {' '.join(str(error).split())}") from None
    meta: dict[str, Any] = about["meta"]
    return meta


def describe(
    net: Module, optimizer: Optimizer | None = None, scheduler: LRScheduler | None = None
) -> dict[str, str | list[Any]]:
    """What must be the same for a checkpoint to fit: one entry for each thing that can differ, JSON-able.

    Modules with their settings and stores; shape, dtype and tuning of the parameters; buffers; the values of
    what never changes (frozen parameters, factors of LANCE) as SHA-256; generators; kind of optimiser and schedule.
    """
    entries: dict[str, str | list[Any]] = {"network": type(net).__name__}
    for path, module in net.named_modules():
        key = f"module {path or '(root)'}"
        while key in entries:  # a wrapper without a name of its own, and what it wraps
            key += ", inside"
        entries[key] = f"{type(module).__name__}({module.extra_repr()})"
    for name, parameter in net.named_parameters():
        use = "trains" if parameter.requires_grad else "frozen"
        entries[f"parameter {name}"] = [list(parameter.shape), str(parameter.dtype), use]
    for name, array in net.named_buffers():
        entries[f"buffer {name}"] = [list(array.shape), str(array.dtype)]
    frozen = {name: parameter.data for name, parameter in net.named_parameters() if not parameter.requires_grad}
    entries["values of the frozen parameters"] = digest(frozen)
    for path, layer in weighted_layers(net).items():
        entries[f"store of {path or '(root)'}"] = _store_settings(layer.store)
    for name, generator in generators(net).items():
        entries[f"random generator {name}"] = type(generator.bit_generator).__name__
    entries["optimiser"] = "none" if optimizer is None else f"{type(optimizer).__name__} of {len(optimizer.params)}"
    entries["schedule"] = "none" if scheduler is None else type(scheduler).__name__
    return entries


def _store_settings(store: ActivationStore) -> list[Any]:
    """What a store was made with, without what varies from step to step."""
    settings = {name: value for name, value in store.describe().items() if name not in VARYING}
    settings |= {name: getattr(store, name) for name in ("given", "modes", "seed") if hasattr(store, name)}
    if getattr(store, "sketch", None) is not None:
        settings["seed"] = store.sketch.seed  # type: ignore[attr-defined]
    if fixed := store.fixed():
        settings["factors"] = digest(fixed)
    return [f"{name}: {value}" for name, value in settings.items()]


def digest(arrays: Mapping[str, np.ndarray]) -> str:
    """SHA-256 over names, dtypes, shapes and values, in this order, in hexadecimal digits.

    >>> x = np.array([[1.0, 2.0]])
    >>> digest({"x": x}) == digest({"x": x.copy()}), digest({"x": x}) == digest({"x": x.T})
    (True, False)
    """
    result = hashlib.sha256()
    for name, array in arrays.items():
        result.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        result.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return result.hexdigest()


def generators(net: Module) -> dict[str, np.random.Generator]:
    """The library's default generator, and every other that a module holds, by path and attribute; each once."""
    found = {"default": as_generator(None)}
    seen = {id(found["default"].bit_generator)}
    for path, module in net.named_modules():
        for name, value in vars(module).items():
            if isinstance(value, np.random.Generator) and id(value.bit_generator) not in seen:
                seen.add(id(value.bit_generator))
                found[f"{path}.{name}" if path else name] = value
    return found


def remove_partial(path: str | os.PathLike[str]) -> None:
    """Delete what a killed process may have left of a checkpoint it was writing; the checkpoint itself is kept."""
    path = Path(path)
    for leftover in path.parent.glob(f".{escape(path.name)}.*.unfinished"):
        leftover.unlink(missing_ok=True)


# ---- state as arrays -------------------------------------------------------------------


def _stores(net: Module) -> Iterator[tuple[str, Any]]:
    """(prefix of the names of its arrays, store) for every layer with weights."""
    for position, layer in enumerate(weighted_layers(net).values()):
        yield f"store/{position}/", layer.store


def _collect(
    net: Module, optimizer: Optimizer | None, scheduler: LRScheduler | None
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Copies of all arrays by name, and the states of the generators as JSON-able mappings."""
    parts: list[tuple[str, Mapping[str, np.ndarray]]] = [("net/", net.state_dict())]
    parts += [] if optimizer is None else [("optimizer/", optimizer.state_dict())]
    parts += [] if scheduler is None else [("scheduler/", scheduler.state_dict())]
    parts += [(prefix, store.state()) for prefix, store in _stores(net)]
    arrays = {prefix + name: np.array(array) for prefix, part in parts for name, array in part.items()}
    return arrays, {name: _plain(rng.bit_generator.state) for name, rng in generators(net).items()}


def _restore(
    arrays: Mapping[str, np.ndarray],
    randomness: Mapping[str, Any],
    net: Module,
    optimizer: Optimizer | None,
    scheduler: LRScheduler | None,
) -> None:
    """Put back what :func:`_collect` gave."""
    net.load_state_dict(_part(arrays, "net/"))
    if optimizer is not None:
        optimizer.load_state_dict(_part(arrays, "optimizer/"))
    if scheduler is not None:
        scheduler.load_state_dict(_part(arrays, "scheduler/"))
    for prefix, store in _stores(net):
        store.load_state(_part(arrays, prefix))
    for name, generator in generators(net).items():
        generator.bit_generator.state = _unplain(randomness[name])


def _part(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose names start so, without that start."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def _plain(value: Any) -> Any:
    """The state of a bit generator with lists in place of arrays."""
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if isinstance(value, np.ndarray):
        return {"array": value.tolist(), "dtype": value.dtype.str}
    return int(value) if isinstance(value, np.integer) else value


def _unplain(value: Any) -> Any:
    """The inverse of :func:`_plain`."""
    if not isinstance(value, Mapping):
        return value
    if set(value) == {"array", "dtype"}:
        return np.array(value["array"], dtype=value["dtype"])
    return {name: _unplain(item) for name, item in value.items()}


# ---- checks ------------------------------------------------------------------------------


def _about(path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The part that is no array, checked for form."""
    try:
        about = json.loads(arrays["about"].tobytes())
        parts = [about[name] for name in ("description", "settings", "generators", "meta")]
        if about["format"] != FORMAT or not all(isinstance(part, dict) for part in parts):
            raise ValueError
    except (KeyError, TypeError, ValueError, RecursionError):  # a text that is no JSON is a ValueError
        raise ValueError(f"{path}: is no checkpoint of format {FORMAT}") from None
    return dict(about)


def _compare(path: str | os.PathLike[str], saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ValueError with the first entry in which the two differ."""
    for name in (*own, *(name for name in saved if name not in own)):
        there, here = saved.get(name, "absent"), own.get(name, "absent")
        if there != here:
            raise ValueError(
                f"{path}: is a checkpoint of another run: {name} is {_shown(there)} there and {_shown(here)} here"
            )


def _shown(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."
