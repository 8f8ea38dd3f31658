"""One way to say a net to train: a name, ``pkg.module:factory``, or a ``file.onnx``; with as many outputs as the data.

Every command that trains a net or looks at its activations makes it here, and its results say where the weights came
from. What is only traced is built by :func:`analysis.steps.nets.build`, of the same names.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

import lance_ref
from analysis.steps.nets import build, input_shape_for, step_records
from lance_ref import models, nn
from lance_ref.datasets.dataset import affine, to_network
from lance_ref.nn.init import default_bound, uniform_parameter
from lance_ref.nn.module import Module
from lance_ref.nn.selection import choose, weighted_layers

Normalise = Callable[[np.ndarray], np.ndarray]
"""A function from uint8 (B, H, W, C) to float32 (B, C, H, W)."""
SOME_CLASSES = 10
"""Told to a factory that takes a number of classes where the number does not matter."""


@dataclass(frozen=True)
class Weights:
    """Where the weights of a net came from, as results say it."""

    origin: str  #: "pretrained file", "user's factory", "ONNX file" or "freshly initialised".
    words: str  #: The same for a reader, in a clause.
    file: str | None  #: Its name without the folder; None without a file.
    sha256: str  #: Of the file; of all parameters and buffers where there is none.
    head: str  #: What became of the classifier: "own" or "fresh".


@dataclass(frozen=True)
class NetChoice:
    """A net by what stands behind ``--net``."""

    name: str

    @property
    def is_onnx(self) -> bool:
        return self.name.endswith(".onnx")

    @property
    def is_built_in(self) -> bool:
        """Whether it has a name of :func:`lance_ref.models.names`, perhaps with ``@width``."""
        return not self.is_onnx and ":" not in self.name

    @property
    def pretrained(self) -> models.Weights | None:
        """The file of pretrained weights that the net has; None for another net, and for one of another width."""
        return models.find(self.name).weights if self.is_built_in and "@" not in self.name else None

    @cached_property
    def _file_shape(self) -> tuple[int, ...]:
        """What an ONNX file says of one input; () if that is no picture, or the file leaves it open."""
        try:
            shape = input_shape_for(self.name, None, None)
        except ValueError:
            return ()
        return shape if len(shape) == 3 else ()

    @property
    def image_size(self) -> int | None:
        """Pixels of the square images that the net is made for; None where images may stay as they are."""
        if self.is_onnx:
            return self._file_shape[1] if self._file_shape and self._file_shape[1] == self._file_shape[2] else None
        return None if self.pretrained is None else self.pretrained.image_size

    @property
    def channels(self) -> int | None:
        """Channels that the net must have; None where that depends on the data."""
        if self.is_onnx:
            return self._file_shape[0] if self._file_shape else None
        return None if self.pretrained is None else models.find(self.name).input_shape[0]

    @property
    def own_sha256(self) -> str | None:
        """What tells a user's net from another of the same name: of the file, or of weights made with seed 0.

        None for a built-in net.
        """
        if self.is_built_in:
            return None
        if self.is_onnx:
            return file_sha256(self.name)
        return arrays_sha256(_from_factory(self.name, SOME_CLASSES, (), 0))

    def make(
        self, num_classes: int, input_shape: tuple[int, ...], seed: int, pretrained: bool = True
    ) -> tuple[Module, Weights]:
        """The net with its weights and that many outputs; and where the weights came from.

        Parameters
        ----------
        num_classes : int
            A factory is told where it takes ``num_classes``. The last layer of a net that gives another number is
            replaced by a freshly drawn one of as many outputs.
        input_shape : tuple of int
            Of one input, without the batch: (C, H, W) or (N,).
        seed : int
            Of what is drawn: all weights, or those of a fresh last layer. ``lance_ref.manual_seed`` and, where PyTorch
            is loaded, ``torch.manual_seed`` get it before a factory is called.
        pretrained : bool
            Whether a built-in net gets its pretrained weights, if there are any.

        Raises
        ------
        ValueError
            In one line: there is no such net, it does not run on such an input, gives no scores (batch, classes), or
            its last layer cannot be replaced.
        """
        weights = self.pretrained if pretrained else None
        if self.is_built_in:
            net = self._built_in(num_classes, input_shape, seed, weights is not None)
            if weights is None:
                return net, self.origin(net)
            words = f"{Path(weights.file).name} ({weights.origin})"
            head = "own" if num_classes in weights.classes else "fresh"
            return net, Weights("pretrained file", words, Path(weights.file).name, weights.sha256, head)
        if self.is_onnx:
            net = build(self.name, None, input_shape, without_weights=False)
        else:
            net = _from_factory(self.name, num_classes, input_shape, seed)
        said = self.origin(net)
        net.to("float32")
        net.train()
        given = step_records(net, self.name, input_shape, 2, "float32").classes
        if not given:
            raise ValueError(f"net {self.name!r} does not give scores (batch, classes), which cross-entropy needs")
        if given == num_classes:
            return net, said
        with_outputs(net, self.name, given, num_classes, seed)
        step_records(net, self.name, input_shape, 2, "float32")
        return net, Weights(**{**asdict(said), "head": "fresh"})

    def _built_in(self, num_classes: int, input_shape: tuple[int, ...], seed: int, pretrained: bool) -> Module:
        if "@" in self.name:
            lance_ref.manual_seed(seed)
            return build(self.name, num_classes, input_shape, without_weights=False)
        spec = models.find(self.name)
        fitting = spec.options_for(input_shape) if spec.weights is None else {}
        more: dict[str, Any] = {"pretrained": True} if pretrained else dict(fitting)
        return models.create(self.name, num_classes=num_classes, rng=seed, **more)

    def origin(self, net: Any) -> Weights:
        """The origin of the weights of a net that was made without pretrained ones; it may be a module of PyTorch."""
        if self.is_onnx:
            file, digest = Path(self.name).name, file_sha256(self.name)
            return Weights("ONNX file", f"those of {file} (sha256 {digest[:16]})", file, digest, "own")
        if self.is_built_in:
            words = f"{self.name}, freshly initialised"
            return Weights("freshly initialised", words, None, arrays_sha256(net), "fresh")
        return Weights("user's factory", f"those of {self.name}", None, arrays_sha256(net), "own")

    def check_tune(self, selection: str) -> None:
        """Raise ValueError unless the net has the layers that ``--tune`` selects."""
        shape = (3, 32, 32) if self.is_onnx else input_shape_for(self.name, None, None)
        built = build(self.name, SOME_CLASSES, shape, without_weights=True)
        try:
            choose(built, selection)
        except ValueError as error:
            raise ValueError(f"--tune is {selection!r} for {self.name}: {error}") from None

    def normalise(
        self, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> tuple[Normalise, str]:
        """What turns pixels into the input, and the words for it.

        Without ``mean`` and ``std`` it is what pretrained weights were trained with, and pixel / 255 for other nets.
        With them it is (pixel / 255 - mean) / std, one number for all channels or one for each.

        Raises
        ------
        ValueError
            If one of them is missing, no finite number, or not positive (``std``).
        """
        if (mean is None) != (std is None):
            raise ValueError(f"mean is {mean} and std {std}, expected both or none")
        if mean is None or std is None:
            if self.pretrained is not None:
                return models.preprocessing(self.name), "as the pretrained weights were trained"
            mean, std = [0.0], [1.0]
        for name, values in (("mean", mean), ("std", std)):
            if not values or not all(np.isfinite(values)) or len(values) not in (1, max(len(mean), len(std))):
                raise ValueError(f"{name} is {list(values)}, expected one finite number, or one for each channel")
        if min(std) <= 0:
            raise ValueError(f"std is {list(std)}, expected positive numbers")
        if not any(mean) and set(std) == {1.0}:
            return _unit, "pixel / 255"
        return _Affine(tuple(mean), tuple(std)), f"(pixel / 255 - mean) / std, mean {list(mean)}, std {list(std)}"


def _unit(pixels: np.ndarray) -> np.ndarray:
    """pixel / 255, of any number of channels."""
    result: np.ndarray = np.ascontiguousarray(pixels.transpose(0, 3, 1, 2), dtype=np.float32) / np.float32(255)
    return result


@dataclass(frozen=True)
class _Affine:
    """(pixel / 255 - mean) / std."""

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, pixels: np.ndarray) -> np.ndarray:
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (1, pixels.shape[3]):
                raise ValueError(f"{name} is {list(values)}, but the images have {pixels.shape[3]} channel(s)")
        return to_network(pixels, *affine((self.mean, self.std), pixels.shape[3]))


def _from_factory(name: str, num_classes: int | None, input_shape: tuple[int, ...], seed: int) -> Module:
    """What a factory gives, from the same random numbers for the same seed."""
    lance_ref.manual_seed(seed)
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.manual_seed(seed)
    before = torch is not None
    net = build(name, num_classes, input_shape, without_weights=False)
    if not before and (torch := sys.modules.get("torch")) is not None:
        torch.manual_seed(seed)  # the factory's module is the first to import it
        net = build(name, num_classes, input_shape, without_weights=False)
    return net


def with_outputs(net: Module, name: str, given: int, num_classes: int, seed: int) -> None:
    """Give the last layer of a net that many outputs, freshly drawn, in place.

    Raises
    ------
    ValueError
        If the last layer is not what gives the scores, or shares its weight with another layer.
    """
    layers = weighted_layers(net)
    path, head = next(reversed(layers.items()), ("", None))
    outputs = None if head is None else head.weight.shape[0]
    shared = head is not None and sum(layer.weight is head.weight for layer in layers.values()) > 1
    if head is None or outputs != given or shared or getattr(head, "groups", 1) != 1:
        why = "shares its weight" if shared else f"has {outputs} outputs"
        raise ValueError(
            f"net {name!r} gives {given} scores, the data have {num_classes} classes, and its last layer {path!r} "
            f"{why}, so that it cannot be replaced: make a net of {num_classes} classes, or a factory that takes "
            "num_classes"
        )
    rng = np.random.default_rng(seed)
    shape = (num_classes, *head.weight.shape[1:])
    head.weight = uniform_parameter(shape, default_bound(shape), rng)
    if head.bias is not None:
        head.bias = uniform_parameter(shape[:1], default_bound(shape), rng)
    setattr(head, "out_features" if isinstance(head, nn.Linear) else "out_channels", num_classes)


def file_sha256(path: str) -> str:
    """SHA-256 of a file, in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def arrays_of(module: Any) -> dict[str, np.ndarray]:
    """Parameters and buffers by name, of a net of the library or a module of PyTorch."""
    return {
        name: value if isinstance(value, np.ndarray) else value.detach().cpu().double().numpy()
        for name, value in module.state_dict().items()
        if isinstance(value, np.ndarray) or hasattr(value, "detach")
    }


def arrays_sha256(module: Any) -> str:
    """SHA-256 of all parameters and buffers, in their order."""
    digest = hashlib.sha256()
    for array in arrays_of(module).values():
        digest.update(array.tobytes())
    return digest.hexdigest()
