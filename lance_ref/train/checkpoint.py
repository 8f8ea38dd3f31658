"""Checkpoints: everything the next training step depends on, in one ``.npz`` file without pickles.

That is the network's parameters and buffers, the state of the optimiser, of the schedule and of the
layers' activation stores, and of every random generator the network draws from. A description of the
network lies beside them, so that a checkpoint of another network, or of another run, is refused.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lance_ref.engine.random import as_generator
from lance_ref.io.npz import digest, load_npz, save_npz
from lance_ref.io.whole_file import remove_leftovers
from lance_ref.nn.module import Module
from lance_ref.nn.selection import weighted_layers
from lance_ref.optim import LRScheduler, Optimizer
from lance_ref.stores import ActivationStore

FORMAT = 2
VARYING = ("ranks", "shape", "selected")  # in what a store says of itself after a step
NOT_NEGATIVE = ("running_var", "exp_avg_sq")
"""Means of squares, by the last part of their name that is no number."""

BROKEN = (KeyError, TypeError, ValueError, AttributeError, OverflowError)
"""What a state that does not fit can raise while it is put back."""


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
    meta : mapping, optional
        What :func:`load` is to return, such as the step and the history; finite numbers, text, lists and mappings.
    settings : mapping, optional
        Settings of the run, likewise; :func:`load` refuses a checkpoint with others.

    Raises
    ------
    ValueError, TypeError
        If ``meta`` or ``settings`` cannot be written as JSON, or a part of the state is not finite.
    OSError
        If the file cannot be written, for instance because the disk is full.

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
    check_sound(arrays)
    about = {
        "description": describe(net, optimizer, scheduler),
        "settings": dict(settings or {}),
        "generators": randomness,
        "meta": dict(meta or {}),
    }
    write(path, about, arrays)


def load(
    path: str | os.PathLike[str],
    net: Module,
    optimizer: Optimizer | None = None,
    scheduler: LRScheduler | None = None,
    *,
    settings: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Restore the state that :func:`save` wrote, with stores and random generators. Returns ``meta``.

    Network, optimiser and schedule must be made as they were for the run that wrote the checkpoint, and are changed in
    place, as are the generators that the network draws from and the library's default generator. ``settings`` must be
    those given to :func:`save`.

    Raises
    ------
    ValueError
        One line: the file is damaged or no checkpoint, belongs to another network or other settings (then the line
        names the first difference), or holds a state that no training leads to: an array of another dtype than what
        it is for, numbers that are not finite, a negative variance. Nothing has been changed.
    OSError
        If the file cannot be opened.
    """
    about, arrays = read(path, ("description", "settings", "generators", "meta"))
    if "micro_batch" in about["settings"]:  # the name of ``chunk`` in files of before
        about["settings"]["chunk"] = about["settings"].pop("micro_batch")
    for name, own in (("settings", dict(settings or {})), ("description", describe(net, optimizer, scheduler))):
        compare(path, about[name], json.loads(json.dumps(own)))
    earlier = _collect(net, optimizer, scheduler)
    try:
        check_sound(arrays)
        check_dtypes(arrays, {**examples(arrays, net, optimizer), **earlier[0]})
        _check_settings(arrays, optimizer, scheduler)
        _restore(arrays, about["generators"], net, optimizer, scheduler)
    except BROKEN as error:
        _restore(*earlier, net, optimizer, scheduler)
        raise misfit(path, error) from None
    meta: dict[str, Any] = about["meta"]
    return meta


def describe(
    net: Module, optimizer: Optimizer | None = None, scheduler: LRScheduler | None = None
) -> dict[str, str | list[Any]]:
    """What must be the same for a checkpoint to fit: one entry for each thing that can differ, JSON-able.

    Modules with their settings and stores; shape, dtype and tuning of the parameters; buffers; the values of
    what never changes (frozen parameters, factors of LANCE) as SHA-256; generators; optimiser and schedule with
    their settings. (Of the learning rate, which varies, it is the one that the optimiser was made with.)
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
    if optimizer is not None:
        made_with = {name: getattr(optimizer, name) for name in optimizer.settings} | {"lr": optimizer.initial_lr}
        entries |= {f"optimiser's {name}": _setting(value) for name, value in made_with.items()}
    entries["schedule"] = "none" if scheduler is None else type(scheduler).__name__
    if scheduler is not None:
        made_with = {name: value for name, value in vars(scheduler).items() if name not in ("optimizer", "last_epoch")}
        entries |= {f"schedule's {name}": _setting(value) for name, value in made_with.items()}
    return entries


def _setting(value: Any) -> str:
    """As text that is the same in another process: of what has no such text, its kind."""
    value = value.item() if isinstance(value, np.generic) else value
    plain = value is None or isinstance(value, (bool, int, float, str, tuple, list))
    return repr(value) if plain else type(value).__name__


def _store_settings(store: ActivationStore) -> list[Any]:
    """What a store was made with, without what varies from step to step."""
    settings = {name: value for name, value in store.describe().items() if name not in VARYING}
    settings |= store.settings()
    if fixed := store.fixed():
        settings["factors"] = digest(fixed)
    return [f"{name}: {value}" for name, value in settings.items()]


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


def checked_path(path: str | os.PathLike[str]) -> Path:
    """The path of a checkpoint that a run is going to write, cleared of what killed processes left beside it.

    ValueError if it is a folder, or its folder does not exist.
    """
    checked = Path(path)
    if checked.is_dir() or not checked.parent.is_dir():
        what = "is a folder" if checked.is_dir() else "its folder does not exist"
        raise ValueError(f"checkpoint is {str(path)!r}, expected a file in an existing folder; {what}")
    remove_leftovers(checked, older_than=0)
    return checked


def check_sound(arrays: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError, with the array's name, if a state holds what no training leads to.

    That is a number that is not finite, an array of anything but numbers, or a mean of squares below 0.
    """
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise ValueError(f"{name} has dtype {array.dtype}, expected real numbers")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} holds NaN or infinity")
        words = [word for word in name.replace("/", ".").split(".") if not word.isdecimal()]
        if words and words[-1] in NOT_NEGATIVE and (array < 0).any():
            raise ValueError(f"{name} holds {array.min()}, expected numbers of at least 0")


def check_dtypes(arrays: Mapping[str, np.ndarray], own: Mapping[str, np.ndarray]) -> None:
    """Raise ValueError, with the array's name, if one has another dtype than what it is to become; none is cast."""
    for name, array in arrays.items():
        if name in own and array.dtype != own[name].dtype:
            raise ValueError(f"{name} has dtype {array.dtype}, expected {own[name].dtype}")


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
    arrays = {prefix + name: np.array(array) for prefix, own in parts for name, array in own.items()}
    return arrays, generator_states(net)


def _restore(
    arrays: Mapping[str, np.ndarray],
    randomness: Mapping[str, Any],
    net: Module,
    optimizer: Optimizer | None,
    scheduler: LRScheduler | None,
) -> None:
    """Put back what :func:`_collect` gave."""
    net.load_state_dict(part(arrays, "net/"))
    if optimizer is not None:
        optimizer.load_state_dict(part(arrays, "optimizer/"))
    if scheduler is not None:
        scheduler.load_state_dict(part(arrays, "scheduler/"))
    for prefix, store in _stores(net):
        store.load_state(part(arrays, prefix))
    set_generators(net, randomness)


def _check_settings(
    arrays: Mapping[str, np.ndarray], optimizer: Optimizer | None, scheduler: LRScheduler | None
) -> None:
    """The settings among the arrays are those of the description, so that nothing in the file contradicts itself."""
    own = {} if scheduler is None else {"scheduler/base_lr": scheduler.base_lr}
    if optimizer is not None:
        own |= {f"optimizer/{name}": getattr(optimizer, name) for name in optimizer.settings if name != "lr"}
    for name, value in own.items():
        if name in arrays and not np.array_equal(arrays[name], value):
            raise ValueError(f"{name} is {arrays[name]}, expected {value}")


def examples(names: Iterable[str], net: Module, optimizer: Optimizer | None) -> dict[str, np.ndarray]:
    """An array of the right dtype for what is made at the first step only: buffers, and warm starts of stores."""
    found: dict[str, np.ndarray] = {}
    if optimizer is not None:
        for position, parameter in enumerate(optimizer.params):
            found |= {f"optimizer/{name}.{position}": parameter.data for name in optimizer.buffer_names}
    for (prefix, _), layer in zip(_stores(net), weighted_layers(net).values(), strict=True):
        found |= {name: layer.weight.data for name in names if name.startswith(prefix)}
    return found


def part(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    """The arrays whose names begin with ``prefix``, by the rest of their names."""
    return {name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)}


def generator_states(net: Module) -> dict[str, Any]:
    """The states of all random generators (:func:`generators`), fit for JSON."""
    return {name: _plain(rng.bit_generator.state) for name, rng in generators(net).items()}


def set_generators(net: Module, states: Mapping[str, Any]) -> None:
    """Put all random generators into the states that :func:`generator_states` gave."""
    for name, generator in generators(net).items():
        generator.bit_generator.state = _unplain(states[name])


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


# ---- the file ------------------------------------------------------------------------------


def write(path: str | os.PathLike[str], about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> None:
    """Write a checkpoint: arrays, and what is told about them as JSON beside the number of the format."""
    text = json.dumps({"format": FORMAT, **about}, allow_nan=False).encode()
    try:
        save_npz(path, {"about": np.frombuffer(text, np.uint8), **arrays})
    except OSError as error:
        reason = f"the checkpoint was not written ({error.strerror or error}); an earlier one is as it was"
        raise OSError(error.errno, reason, str(path)) from error


def read(
    path: str | os.PathLike[str], parts: Sequence[str], kind: str = "checkpoint of"
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """What :func:`write` wrote; ValueError unless every one of these parts of it is a mapping."""
    arrays = load_npz(path, needs_checksum=True)
    try:
        about = json.loads(arrays.pop("about", np.zeros(0, np.uint8)).tobytes())
        version = about["format"]
        if (type(version), version) != (int, FORMAT) or not all(isinstance(about[name], dict) for name in parts):
            raise ValueError
    except (KeyError, TypeError, ValueError, RecursionError):  # a text that is no JSON is a ValueError
        raise ValueError(f"{path}: is no {kind} format {FORMAT}") from None
    return dict(about), arrays


def misfit(path: str | os.PathLike[str] | None, error: Exception) -> ValueError:
    """The one-line error of a checkpoint whose state cannot be put back."""
    return ValueError(f"{path}: the checkpoint does not fit: {' '.join(str(error).split())}")


def compare(path: str | os.PathLike[str], saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ValueError with the first entry in which the two differ, and with the first parameter that does."""
    names = [*own, *(name for name in saved if name not in own)]
    unlike = [name for name in names if saved.get(name, "absent") != own.get(name, "absent")]
    parameters = [
        name for name in unlike[1:] if name.startswith("parameter ") and not unlike[0].startswith("parameter ")
    ]
    differences = [
        f"{name} is {_shown(saved.get(name, 'absent'))} there and {_shown(own.get(name, 'absent'))} here"
        for name in (*unlike[:1], *parameters[:1])
    ]
    if differences:
        raise ValueError(f"{path}: is a checkpoint of another run: {'; '.join(differences)}")


def _shown(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 100 else f"{text[:97]}..."
