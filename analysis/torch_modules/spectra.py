"""Spectra of the activations of a PyTorch module: Gram matrices of its layers' inputs, summed over batches."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from analysis.ranks.spectra_file import MODE_NAMES, LayerSpectra
from analysis.steps.nets import RAISED, CannotRunError, place, said_by
from analysis.torch_modules.run import check_torch, copied, random_numbers_kept
from analysis.torch_modules.selection import on_tokens, weighted_layers


def activation_spectra(module: Any, name: str, batches: Iterable[np.ndarray]) -> dict[str, LayerSpectra]:
    """The energies of every mode of the inputs of all layers but the last, by path.

    Parameters
    ----------
    module : torch.nn.Module
        A copy runs, in evaluation, without gradients.
    name : str
        For messages.
    batches : iterable of array (B, ...)
        Its inputs, all of one shape; they are given the dtype of its weights.

    Raises
    ------
    CannotRunError
        If the module does not run on them.
    ValueError
        If no layer that methods can compress has run.
    """
    check_torch()
    import torch

    with random_numbers_kept(), torch.no_grad():
        _, own = copied(module, name, real=True)
        own.eval()
        grams: dict[str, list[Any]] = {}
        shapes: dict[str, set[tuple[int, ...]]] = {}
        for path, layer in list(weighted_layers(own).items())[:-1]:
            if isinstance(layer, (torch.nn.Conv2d, torch.nn.Linear)):
                on_maps = isinstance(layer, torch.nn.Conv2d)
                layer.register_forward_pre_hook(_adding(path, on_maps, grams, shapes))
        weight = next(own.parameters())
        for batch in batches:
            try:
                own(torch.from_numpy(np.ascontiguousarray(batch)).to(weight.device, weight.dtype))
            except RAISED as error:
                raise CannotRunError(
                    f"net {name!r} cannot run on an input of shape {batch.shape}: {said_by(error)}{place(error)}"
                ) from None
        found = {}
        for path, of in shapes.items():
            shape = next(iter(of))
            if len(of) == 1 and len(shape) in MODE_NAMES:
                found[path] = LayerSpectra(shape, tuple(_energies(path, gram) for gram in grams[path]))
    if not found:
        raise ValueError(f"net {name!r} has no linear layer or 2-D convolution, besides its last one, that ran")
    return found


def _adding(path: str, on_maps: bool, grams: dict[str, list[Any]], shapes: dict[str, set[tuple[int, ...]]]) -> Any:
    """A hook that adds A_(n) A_(n)ᵀ of every mode n to the sums of a layer, in float64."""

    def hook(_: Any, args: tuple[Any, ...]) -> None:
        A = args[0] if on_maps else args[0].reshape(on_tokens(tuple(args[0].shape)))
        shapes.setdefault(path, set()).add(tuple(A.shape))
        if len(shapes[path]) > 1:  # factors fit one shape: such a layer is left out
            return
        unfolded = (A.double().movedim(mode, 0).reshape(n, -1) for mode, n in enumerate(A.shape))
        products = [U @ U.T for U in unfolded]
        grams[path] = products if path not in grams else [a + b for a, b in zip(grams[path], products, strict=True)]

    return hook


def _energies(path: str, gram: Any) -> np.ndarray:
    """Eigenvalues, descending, none below 0."""
    import torch

    if not torch.isfinite(gram).all():
        raise ValueError(f"layer {path!r} has inputs that are NaN or infinite, their spectra cannot be measured")
    energies: np.ndarray = torch.linalg.eigvalsh(gram).flip(0).clamp(min=0).cpu().numpy()
    return energies
