"""A compiled training step: instructions, an arena, and what can be asked of them."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from lance_ref.device import report
from lance_ref.device.arena import PERSISTENT, Array, Memory
from lance_ref.device.c import Exported, export
from lance_ref.device.graph import Graph, Node
from lance_ref.device.layout import DeviceLayout, Recipe, flash, lay_out
from lance_ref.nn.module import Module

_DESCRIBED = {"name": "name", "kind": "kind", "offset": "offset", "bytes": "nbytes", "first": "first", "last": "last"}
"""What a report says of an array: its key there, and the attribute of the array."""


class Program:
    """One training step with every array at a fixed address; made by :func:`lance_ref.device.compile`.

    Attributes
    ----------
    layout : DeviceLayout
        Instructions and arrays.
    ram_bytes : int
        Bytes of the arena: everything that changes while the device runs, in one block.
    lower_bound_bytes : int
        The largest sum of bytes that are alive at once; no placing needs less.
    method : str
        One of ``lance``, ``bp``, ``bias`` and ``head``.
    budget : int or None
        Bytes that were allowed.
    """

    def __init__(
        self,
        graph: Graph,
        recipe: Recipe,
        layout: DeviceLayout,
        method: str,
        budget: int | None = None,
        poison: bool = False,
    ) -> None:
        self.graph, self.recipe, self.layout = graph, recipe, layout
        self.method, self.budget = method, budget
        self._pixels = recipe.pixels  # kept while images come as floats
        self._poison = poison
        self._load(layout, None)

    def _load(self, layout: DeviceLayout, state: dict[str, np.ndarray] | None) -> None:
        """A fresh arena with the trained arrays in it."""
        self.layout = layout
        self.flash = flash(self.graph, self.recipe, layout.layers)
        self._memory = Memory(layout.ram_bytes, self._poison)
        for array in self._persistent():
            self._memory[array][...] = 0
        for layer in layout.layers.values():
            for trained, value in ((layer.weight, layer.conv.weight), (layer.bias, layer.conv.bias)):
                if trained is not None:
                    self._memory[trained][...] = value
        if state is not None:
            for array in self._persistent():
                self._memory[array][...] = state[array.name]
        ends: dict[int, list[Array]] = {}
        for array in layout.arrays:
            ends.setdefault(array.last, []).append(array)
        self._ends = ends

    def _persistent(self) -> list[Array]:
        return [array for array in self.layout.arrays if array.kind in PERSISTENT]

    # ---- what it needs --------------------------------------------------------------------------

    @property
    def ram_bytes(self) -> int:
        """Bytes of the arena."""
        return self.layout.ram_bytes

    @property
    def lower_bound_bytes(self) -> int:
        """The largest sum of bytes that are alive at once."""
        return self.layout.lower_bound_bytes

    @property
    def flash_bytes(self) -> int:
        """Bytes of frozen weights, factors and other constants."""
        return sum(array.nbytes for array in self.flash.values())

    @property
    def ram(self) -> dict[str, int]:
        """Bytes by kind at the moment when most are alive."""
        return self.layout.ram

    @property
    def macs(self) -> dict[str, int]:
        """Multiply-adds that ran in the last step, by kind, for all its images."""
        return dict(self._memory.macs)

    # ---- running --------------------------------------------------------------------------------

    def step(self, images: np.ndarray, labels: Any, lr: float) -> float:
        """Train on some images; returns their mean loss, before the updates.

        Parameters
        ----------
        images : (B, H, W, C) uint8, or (B, C, H, W) floats
            Pixels, or input that is preprocessed already. With floats the image takes four or eight times the room; the
            program is laid out again.
        labels : (B,) integers
        lr : float
            Learning rate. With ``update="batch"`` the mean gradient of the B images is one update; otherwise each
            image's gradient is.

        Raises
        ------
        ValueError, TypeError
            If shape, dtype or values do not fit.
        FloatingPointError
            If the loss or a trained number becomes NaN or infinite. Weights and gradients are then as before.
        """
        images, labels = self._checked(images, labels)
        _check_rate(lr)
        m, update = self._memory, self.layout.update
        before = {array: m[array].copy() for array in self._persistent()}
        m.macs, m.rate = {}, float(lr)
        by_image = self.recipe.update == "image"
        losses = []
        try:
            with np.errstate(all="ignore"):  # reported below
                for i, (image, label) in enumerate(zip(images, labels, strict=True)):
                    if update is not None and (by_image or i == 0):
                        update.begin(m)
                    losses.append(self._one(image, int(label), 1 if by_image else len(images)))
                    if update is not None and (by_image or i == len(images) - 1):
                        update.run(m)
            self._check_finite(losses)
        except BaseException:
            for array, value in before.items():
                m[array][...] = value
            raise
        return float(np.mean(losses))

    def _one(self, image: np.ndarray, label: int, images: int) -> float:
        m, layout = self._memory, self.layout
        time = self._run_forward(image, training=True)
        loss = layout.loss.run(m, label, images)
        self._bury(time)
        for instruction in layout.backward:
            time += 1
            instruction.run(m)
            self._bury(time)
        return loss

    def _run_forward(self, image: np.ndarray, training: bool) -> int:
        m, layout = self._memory, self.layout
        m[layout.image][...] = image
        for tile in layout.tiles:
            for time, instruction in enumerate(tile):
                instruction.run(m, training)
                if time < len(tile) - 1:
                    self._bury(time)
        time = self.layout.choice.tiled
        if time:
            self._bury(time - 1)
        for instruction in layout.forward:
            instruction.run(m, training)
            self._bury(time)
            time += 1
        return time

    def _bury(self, time: int) -> None:
        self._memory.bury(array for array in self._ends.get(time, ()) if time < len(self.layout.times) - 1)

    def _check_finite(self, losses: list[float]) -> None:
        if not np.isfinite(losses).all():
            raise FloatingPointError(f"the loss is {losses[-1]}, expected a finite number; nothing was changed")
        for array in self._persistent():
            if array.dtype.kind == "f" and not np.isfinite(self._memory[array]).all():
                raise FloatingPointError(f"{array.name} became NaN or infinite; nothing was changed")

    def logits(self, images: np.ndarray) -> np.ndarray:
        """What the classifier gives for each image, (B, classes)."""
        images, _ = self._checked(images, None)
        rows = []
        for image in images:
            self._run_forward(image, training=False)
            rows.append(self._memory[self.layout.logits].reshape(-1).copy())
        return np.stack(rows)

    def predict(self, images: np.ndarray) -> np.ndarray:
        """The most likely class of each image, (B,)."""
        return self.logits(images).argmax(1)

    def evaluate(self, images: np.ndarray, labels: Any) -> float:
        """The share of images whose class is predicted rightly."""
        images, labels = self._checked(images, labels)
        return float((self.predict(images) == labels).mean())

    def _checked(self, images: np.ndarray, labels: Any) -> tuple[np.ndarray, np.ndarray]:
        images = np.asarray(images)
        C, H, W = self.graph.shapes[0]
        in_bytes = images.dtype == np.uint8
        shapes = {(H, W, C)} if in_bytes else {(C, H, W), (C,) if (H, W) == (1, 1) else (C, H, W)}
        if not in_bytes and images.dtype.kind != "f":
            raise TypeError(f"images have dtype {images.dtype}, expected uint8 pixels or preprocessed floats")
        if images.ndim < 2 or not len(images) or images.shape[1:] not in shapes:
            expected = " or ".join(str(("B", *shape)) for shape in sorted(shapes)).replace("'", "")
            raise ValueError(f"images have shape {images.shape} and dtype {images.dtype}, expected {expected}")
        if in_bytes and self._pixels is None:
            raise TypeError("images have dtype uint8, but this net takes vectors, expected preprocessed floats")
        if not in_bytes:
            if not np.isfinite(images).all():
                raise ValueError("images contain NaN or infinity, expected finite numbers")
            images = images.reshape(-1, C, H, W).astype(self.graph.dtype, copy=False)
        if in_bytes != (self.recipe.pixels is not None):
            self._change_image(in_bytes)
        if labels is None:
            return images, np.zeros(0, int)
        labels = np.asarray(labels)
        classes = self.graph.shapes[self.graph.output][0]
        if labels.dtype.kind not in "iu" or labels.shape != (len(images),):
            came = f"shape {labels.shape} and dtype {labels.dtype}"
            raise ValueError(f"labels have {came}, expected {len(images)} integers")
        if labels.min() < 0 or labels.max() >= classes:
            raise ValueError(f"labels run from {labels.min()} to {labels.max()}, expected 0 to {classes - 1}")
        return images, labels

    def _change_image(self, in_bytes: bool) -> None:
        """Lay the program out again for images of bytes or of floats; what was trained stays."""
        recipe = replace(self.recipe, pixels=self._pixels if in_bytes else None)
        layout = lay_out(self.graph, recipe, self.layout.choice)
        layout.place()
        state = {array.name: self._memory[array].copy() for array in self._persistent()}
        self.recipe = recipe
        self._load(layout, state)

    # ---- what was learned -----------------------------------------------------------------------

    def weights(self) -> dict[str, np.ndarray]:
        """The parameters that train by their dotted names, with D merged: W_0 + D ×₂ U."""
        found: dict[str, np.ndarray] = {}
        for layer in self.layout.layers.values():
            conv, m = layer.conv, self._memory
            if conv.weight_name is not None:
                if layer.change is None:
                    assert layer.weight is not None
                    weight = m[layer.weight].copy()
                else:
                    assert layer.basis is not None
                    D = m[layer.change]  # (C_out, r, k_h, k_w); of a linear layer (C_out, r, 1, 1)
                    # U has (C, 1, 1, r), or (C, H, W, r) of a linear layer, whose kernel is the whole input.
                    change = np.tensordot(D, layer.basis, ((1,), (3,)))  # (C_out, k_h, k_w, C, H, W)
                    change = change[:, 0, 0] if conv.is_linear else change[..., 0, 0].transpose(0, 3, 1, 2)
                    weight = conv.weight + change
                found[conv.weight_name] = weight.reshape(len(weight), -1) if conv.is_linear else weight
            if conv.bias_name is not None:
                assert layer.bias is not None
                found[conv.bias_name] = m[layer.bias].copy()
        return found

    def gradients(self) -> dict[str, np.ndarray]:
        """The gradients that were added up for the last update, by array; empty where there is no room for them."""
        pairs = () if self.layout.update is None else self.layout.update.pairs
        return {weight.name: self._memory[gradient].copy() for weight, gradient in pairs}

    def load_into(self, net: Module) -> None:
        """Write :meth:`weights` into a network.

        Raises
        ------
        ValueError
            If it has no such parameters, or they have other shapes; then nothing is written.
        """
        parameters = dict(net.named_parameters())
        weights = self.weights()
        for name, value in weights.items():
            there = parameters[name].shape if name in parameters else None
            if there != value.shape:
                raise ValueError(f"parameter {name!r} of the net has shape {there}, expected {value.shape}")
        for name, value in weights.items():
            parameters[name].data = value.astype(parameters[name].dtype)

    def value(self, array: Array) -> np.ndarray:
        """A copy of what an array of the arena holds."""
        return self._memory[array].copy()

    # ---- other forms of it ----------------------------------------------------------------------

    def with_weights(self, change: Callable[[np.ndarray], np.ndarray]) -> Program:
        """A program of its own whose frozen weights are changed.

        What was learned until now is copied; gradients, or with momentum the velocity, start from zero.
        """

        def changed(node: Node) -> Node:
            layer = None if node.conv is None else self.layout.layers.get(node.conv.path)
            if node.conv is None or (layer is not None and layer.weight is not None):
                return node
            return replace(node, conv=replace(node.conv, weight=change(node.conv.weight)))

        new = {node: changed(node) for node in self.graph.nodes}
        graph = replace(self.graph, nodes=list(new.values()))
        choice = self.layout.choice
        choice = replace(choice, heads={new[node]: is_head for node, is_head in choice.heads.items()})
        layout = lay_out(graph, self.recipe, choice)
        layout.place()
        program = Program(graph, self.recipe, layout, self.method, self.budget, self._poison)
        program._pixels = self._pixels
        state = {array.name: self.value(array) for array in self._persistent()}
        for array in self._persistent():
            if not array.is_state:
                state[array.name][:] = 0
        program._load(layout, state)
        return program

    def export_c(
        self,
        folder: str | os.PathLike[str],
        weights: str = "float32",
        *,
        images: np.ndarray | None = None,
        labels: Any = None,
        lr: float = 0.002,
        passes: int = 5,
        batch: int = 8,
        ram_section: str | None = None,
        flash_section: str | None = None,
    ) -> Exported:
        """Write the step as C99 into a folder, with a ``Makefile`` and a ``README.md``.

        Parameters
        ----------
        folder : path
            New, empty, or an earlier export, which is replaced. It is written whole or not at all.
        weights : {"float32", "int8"}
            How frozen weights are stored. In int8 each output channel has a scale; they become floats as they are read.
        images, labels : arrays, optional
            As for :meth:`step`. They are written to ``images.bin``, on which ``make test`` compares the C program with
            this one, and its training program trains. Default: four images of random numbers.
        lr, passes, batch
            Learning rate, passes over the images and images of an update that the training program starts with.
        ram_section, flash_section : str, optional
            Names of the linker's sections for the arena and for constants.

        Returns
        -------
        Exported

        Raises
        ------
        ValueError
            If the program does not compute in float32, or an argument is out of range.
        FileExistsError
            If the folder has other files.
        """
        for name, count in (("passes", passes), ("batch", batch)):
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise ValueError(f"{name} is {count!r}, expected a positive integer")
        _check_rate(lr)
        for name, section in (("ram_section", ram_section), ("flash_section", flash_section)):
            if section is not None and not re.fullmatch(r"[\w.$]+", section):
                raise ValueError(f"{name} is {section!r}, expected the name of a section such as '.bss.dtcm'")
        if (images is None) != (labels is None):
            given, missing = ("labels", "images") if images is None else ("images", "labels")
            raise ValueError(f"{given} are given without {missing}, expected both or neither")
        if images is None:
            rng = np.random.default_rng(0)
            C, H, W = self.graph.shapes[0]
            if self.recipe.pixels is not None:
                images = rng.integers(0, 256, (4, H, W, C)).astype(np.uint8)
            else:
                images = rng.normal(size=(4, C, H, W)).astype(np.float32)
            labels = np.arange(4) % self.graph.shapes[self.graph.output][0]
        images, labels = self._checked(images, labels)
        twin = self.with_weights(lambda weight: weight)  # the expected numbers come from steps
        return export(twin, folder, weights, images, labels, float(lr), passes, batch, ram_section, flash_section)

    # ---- looking at it --------------------------------------------------------------------------

    def describe(self) -> dict[str, Any]:
        """Everything that a report says, as plain data."""
        layout = self.layout
        return {
            "method": self.method,
            "update": self.recipe.update,
            "budget_bytes": self.budget,
            "ram_bytes": self.ram_bytes,
            "lower_bound_bytes": self.lower_bound_bytes,
            "ram": self.ram,
            "flash_bytes": self.flash_bytes,
            "tiled_segments": layout.choice.tiled,
            "tile": list(layout.choice.tile),
            "tiles": len(layout.tiles),
            "recomputed_macs": layout.recomputed_macs,
            "arena": [
                {key: getattr(array, attribute) for key, attribute in _DESCRIBED.items()}
                for array in sorted(layout.arrays, key=lambda array: array.offset)
            ],
            "instructions": layout.times,
        }

    def __str__(self) -> str:
        return report.text(self.layout, self.flash_bytes)

    def __repr__(self) -> str:
        return f"Program({self.method}, update={self.recipe.update!r}, {self.ram_bytes:,} bytes of RAM)"

    def plot(self, path: Any) -> None:
        """Draw the arena: addresses against time, a rectangle for each array, and the peak."""
        report.plot(self.layout, path)


def _check_rate(lr: Any) -> None:
    if isinstance(lr, bool) or not isinstance(lr, (int, float, np.floating)) or not 0 <= lr < np.inf:
        raise ValueError(f"lr is {lr!r}, expected a finite number that is not negative")
