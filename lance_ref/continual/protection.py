"""LANCE for one task after another: subspaces outside of what earlier tasks need, and what may then train.

With U_f the factor of a layer's feature mode (patches of a convolution, features of a linear layer) every weight
gradient is dŴ = X U_fᵀ for some X (C_out, r). So U_fᵀM = 0 gives dŴ M = 0 at every step, and sums of such gradients,
scaled by anything, keep it: ΔW M = 0 and the layer answers to inputs in the span of M as before. M itself is
needed between tasks only.

A layer that trains in the subspace (:mod:`lance_ref.nn.subspace`) cannot leave it: ΔW = D U_fᵀ whatever the optimiser
does to D. After the task W_0 ← W_0 + D U_fᵀ (:func:`lance_ref.merge`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lance_ref.algebra.grams import LayerGrams
from lance_ref.algebra.magnitude import near_one, scaled
from lance_ref.algebra.subspace import Subspace, shape_text
from lance_ref.algebra.tucker import check_epsilon
from lance_ref.continual.bases import NOTHING, checked_bases
from lance_ref.engine.tensor import Tensor
from lance_ref.lance.calibration import frames_of, grams_of
from lance_ref.lance.compression import UPDATES, match_layers, put_on
from lance_ref.lance.patches import PatchLance
from lance_ref.models.alexnet_cl import Heads
from lance_ref.nn import Conv2d
from lance_ref.nn.module import Module
from lance_ref.nn.selection import weighted_layers
from lance_ref.optim.optimizer import Optimizer
from lance_ref.optim.sgd import SGD
from lance_ref.stores import EXACT, ActivationStore, Lance

MODES = ("batch", "token", "feature")

OLD_MOMENTUM = 1e-3
"""Share of a momentum buffer along M from which on it is taken for that of an earlier task."""


@dataclass(frozen=True, eq=False)
class TaskCompression:
    """What :func:`compress_for_task` did.

    Attributes
    ----------
    subspaces : dict of layer path to Subspace
        Of the layers that learn.
    frozen : tuple of str
        Paths of the layers where no direction is left to learn in.
    ram_bytes, flash_bytes : int
        Of the factors, which are in memory all through training beside the tape; and of the bases of protected
        directions, which are needed between tasks only.
    core_bytes, input_bytes : dict of layer path to int
        What the tape keeps of one batch of calibration, and what it would keep without compression. Patches overlap: a
        convolution's core can be larger than its input.
    """

    subspaces: dict[str, Subspace]
    frozen: tuple[str, ...]
    ram_bytes: int
    flash_bytes: int
    core_bytes: dict[str, int]
    input_bytes: dict[str, int]

    @property
    def paths(self) -> tuple[str, ...]:
        """The layers that learn."""
        return tuple(self.subspaces)

    @property
    def ranks(self) -> dict[str, tuple[int | None, ...]]:
        """Ranks of batch, token (where there is one) and feature, by layer path; None for a mode left alone."""
        return {path: subspace.ranks for path, subspace in self.subspaces.items()}

    def __str__(self) -> str:
        lines = [
            f"{path}: ranks {shape_text(subspace.ranks)} of {shape_text(subspace.shape)}, "
            f"core {self.core_bytes[path]:,} bytes of {self.input_bytes[path]:,}"
            for path, subspace in self.subspaces.items()
        ]
        lines += [f"{path}: frozen, no direction is left" for path in self.frozen]
        return "\n".join([*lines, f"factors {self.ram_bytes:,} bytes in RAM, bases {self.flash_bytes:,} in flash"])


# ---- before a task -------------------------------------------------------------------------


def compress_for_task(
    net: Module,
    batches: Iterable[Any],
    protected: Mapping[str, np.ndarray | None],
    *,
    epsilon: float,
    modes: Sequence[str] = MODES,
    mean_free: bool = False,
    update: str = "weight",
) -> TaskCompression:
    """Calibrate layers in the null space of their protected directions, and have them keep cores alone.

    Parameters
    ----------
    net : Module
        Changed in place. ``layer.store`` of the layers named in ``protected`` becomes a
        :class:`~lance_ref.stores.Lance`, or, of convolutions, a
        :class:`~lance_ref.lance.patches.PatchLance`, and their weights train. Layers with nothing left to
        learn in get ``weight.requires_grad = False`` and the exact store, which then keeps nothing. Biases and all
        other layers are as they were: see :func:`check_optimizer`.
    batches : iterable of arrays, Tensors, or (inputs, labels) tuples
        Of the new task. With the batch mode selected all have the batch size of training.
    protected : mapping of layer path to (n, m) array or None
        Orthonormal bases, n = I or C_in·k_h·k_w. None, or no columns, for the first task.
    epsilon : float
        Share, in (0, 1], of the energy outside M that every mode holds.
    modes : sequence of str
        Of "batch", "token", "feature"; the feature mode must be one of them.
    mean_free : bool
        Leave the direction of the mean input alone too, for this task. Needs two passes over ``batches``.
    update : {"weight", "subspace"}
        What trains of these layers, as for :func:`lance_ref.compress`. In the subspace any optimiser protects; merge
        after the task.

    Raises
    ------
    ValueError, TypeError
        If an argument is out of range or does not fit the network, or, as in :func:`lance_ref.calibrate`, the
        batches are unfit; names the layer. Nothing has been changed then.

    Notes
    -----
    All modes are those of P ×_f (I − MMᵀ), what is left of the input: the directions of batch and token that hold its
    energy, not that of the parts which are not kept anyway. A layer whose inputs lie in the span of M up to a share of
    1e-12 of their energy has nothing left.
    """
    epsilon = check_epsilon(epsilon)
    if isinstance(modes, str) or not set(modes) <= set(MODES):
        raise ValueError(f"modes are {modes!r}, expected some of {MODES}")
    if "feature" not in modes:
        raise ValueError(f"modes are {tuple(modes)}, without 'feature', whose factor is what protects earlier tasks")
    if update not in UPDATES:
        raise ValueError(f"update is {update!r}, expected one of {', '.join(UPDATES)}")
    bases = checked_bases(net, protected)
    if not bases:
        raise ValueError("protected names no layer, expected a basis (or None) for every layer that is to learn")
    modules = weighted_layers(net)
    given = {path: M if M.shape[1] else None for path, M in bases.items()}
    frames = frames_of(net, batches, given, mean_free, patches=True)
    # Where all n directions are protected there is no subspace to look for.
    open_frames = {
        path: frame
        for path, frame in frames.items()
        if frame.protected is None or frame.protected.shape[1] < len(bases[path])
    }
    energies, sizes = dict.fromkeys(open_frames, 0.0), dict[str, int]()

    def add_energy(layer: LayerGrams, activation: np.ndarray, before: int) -> None:
        """The energy of the whole inputs, in the unit of the Grams, which may have become larger."""
        whole = float(np.square(scaled(activation, -layer.unit), dtype=np.float64).sum())
        energies[layer.layer] = math.ldexp(energies[layer.layer], 2 * (before - layer.unit)) + whole
        sizes.setdefault(layer.layer, activation.size)

    grams = grams_of(net, batches, open_frames, modes, patches=True, see=add_energy)
    # The feature mode is the last one; its energies are those outside of the protected directions.
    left = {path: float(layer.basis(len(layer.shape) - 1)[0].sum()) for path, layer in grams.items()}
    grams = {path: layer for path, layer in grams.items() if left[path] > NOTHING * energies[path]}
    subspaces = {path: layer.subspace(epsilon) for path, layer in grams.items()}
    stores: dict[str, ActivationStore] = {}
    for path, subspace in subspaces.items():
        make = PatchLance if isinstance(modules[path], Conv2d) else Lance
        stores[path] = make(subspace, dtype=modules[path].weight.dtype)
    # Only from here on is the network changed: all that can fail lies behind.
    frozen = tuple(path for path in bases if path not in stores)
    itemsizes = {path: modules[path].weight.dtype.itemsize for path in stores}
    trained = {path: modules[path].weight.requires_grad for path in bases}
    for path in bases:
        modules[path].weight.requires_grad_(path in stores)
    try:
        put_on(net, {path: stores.get(path, EXACT) for path in bases}, update)
    except ValueError:
        for path, trains in trained.items():
            modules[path].weight.requires_grad_(trains)
        raise
    return TaskCompression(
        subspaces,
        frozen,
        ram_bytes=sum(store.factor_bytes for store in stores.values()),
        flash_bytes=sum(M.nbytes for M in protected.values() if M is not None),
        core_bytes={path: itemsizes[path] * math.prod(space.core_shape) for path, space in subspaces.items()},
        input_bytes={path: itemsizes[path] * sizes[path] for path in subspaces},
    )


# ---- during a task -------------------------------------------------------------------------


def check_optimizer(
    optimizer: Optimizer,
    net: Module,
    protected: Mapping[str, np.ndarray | None],
    heads: str | Sequence[str] | None = None,
) -> None:
    """Raise ValueError if a step of ``optimizer`` could move what earlier tasks need, for protected gradients.

    A sum of gradients dŴ with dŴ M = 0, in any proportions, keeps ΔW M = 0: plain SGD, momentum, dampening, Nesterov,
    clipping, any learning rate. Refused are

    * **weight decay**: W itself has a part along M, and loses it;
    * **Adam** and everything that is not SGD: its step is the gradient divided entry by entry, which is no sum of them
      (of layers that train in the subspace every step is allowed);
    * **a momentum buffer of an earlier task**, which has a part along M: make a new optimiser for each task;
    * **a trained bias of a protected layer**: it moves the answer to all inputs;
    * **any other parameter that trains** and is not a head's: a layer without protection, or the weight and bias of
      batch norm, moves the inputs of the layers above. Freeze it after the first task.

    As long as no basis has a column, nothing is refused.

    Parameters
    ----------
    optimizer : Optimizer
        Its parameters count if they require gradients or hold one.
    net : Module
    protected : mapping of layer path to (n, m) array or None
    heads : glob or sequence of globs, optional
        Paths of layers that belong to a single task each. By default all in a
        :class:`~lance_ref.models.alexnet_cl.Heads`; without one the last convolution or linear layer in module order,
        unless it is protected. A single head that all tasks share must be protected like any other layer.
    """
    bases = checked_bases(net, protected)
    if not any(M.shape[1] for M in bases.values()):
        return
    modules = weighted_layers(net)
    weights = {modules[path].weight.uid: path for path in bases}
    updates = {path: modules[path].update for path in bases if modules[path].update is not None}
    inside = {p.uid for update in updates.values() for p in update.parameters()}
    decay: Any = getattr(optimizer, "weight_decay", None)
    if updates and decay:
        _refuse_decay(optimizer, list(updates))
    biases = {modules[path].bias.uid: path for path in bases if modules[path].bias is not None}
    free = {parameter.uid for path in _head_paths(net, heads) for parameter in modules[path].parameters()}
    names = {parameter.uid: name for name, parameter in net.named_parameters()}
    learning = []
    for position, parameter in enumerate(optimizer.params):
        uid = parameter.uid
        if uid not in names or not (parameter.requires_grad or parameter.grad is not None):
            continue
        if uid in weights:
            learning.append((position, weights[uid]))
        elif uid in biases:
            raise ValueError(
                f"the bias of the protected layer {biases[uid]!r} trains, which moves its answers to every input; "
                "freeze it, or leave it out of the optimiser"
            )
        elif uid not in free | inside:
            raise ValueError(
                f"parameter {names[uid]!r} trains, but is neither the weight of a protected layer nor a head's: it "
                "moves what the layers above take in; protect its layer, freeze it, or name it in heads"
            )
    if learning:
        _check_rule(optimizer, [path for _, path in learning])
    for position, path in learning:
        _check_momentum(optimizer, position, path, bases[path])


def _check_rule(optimizer: Optimizer, paths: list[str]) -> None:
    """SGD without weight decay."""
    if not isinstance(optimizer, SGD):
        raise ValueError(
            f"the optimiser is {type(optimizer).__name__}, expected SGD: other rules scale each entry of a gradient by "
            f"itself, and leave the null space of the directions that layers {paths} protect"
        )
    if optimizer.weight_decay:
        _refuse_decay(optimizer, paths)


def _refuse_decay(optimizer: Any, paths: list[str]) -> None:
    raise ValueError(
        f"weight_decay is {optimizer.weight_decay:g}, expected 0: it shrinks the weights of layers {paths} along "
        "the protected directions too"
    )


def _check_momentum(optimizer: Optimizer, position: int, path: str, M: np.ndarray) -> None:
    """A momentum buffer must be orthogonal to M, or new."""
    velocity = optimizer.buffers["momentum_buffer"][position]
    if velocity is None:
        return
    share = leak(np.zeros_like(velocity), velocity, M)
    if share > OLD_MOMENTUM:
        raise ValueError(
            f"the momentum of layer {path!r} has a share of {share:.2g} along its protected directions: it stems from "
            "before they were protected; make a new optimiser for each task"
        )


def _head_paths(net: Module, heads: str | Sequence[str] | None) -> list[str]:
    paths = list(weighted_layers(net))
    if heads is not None:
        return match_layers(heads, paths, "convolution or linear layer")
    groups = [f"{name}." for name, module in net.named_modules() if isinstance(module, Heads)]
    return [path for path in paths if path.startswith(tuple(groups))] if groups else paths[-1:]


def leak(before: np.ndarray | Tensor, after: np.ndarray | Tensor, M: np.ndarray) -> float:
    """‖ΔW M‖_F / ‖ΔW‖_F, the share of a weight's change along protected directions; 0 where nothing changed.

    ``before`` and ``after`` are weights (C_out, ...); M is (n, m), n the product of the sizes after C_out.
    """
    W_0, W_1 = (np.asarray(W.data if isinstance(W, Tensor) else W, dtype=np.float64) for W in (before, after))
    change = (W_1 - W_0).reshape(len(W_0), -1)  # (C_out, n)
    change, _ = near_one(change, "the change of a weight")
    size = float(np.linalg.norm(change))
    return float(np.linalg.norm(change @ M)) / size if size else 0.0
