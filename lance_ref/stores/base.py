"""The interface of activation stores: what a layer with weights keeps of its input for the backward pass."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lance_ref.algebra.basis import Basis
from lance_ref.algebra.geometry import Geometry
from lance_ref.algebra.magnitude import NotFiniteError
from lance_ref.engine.blocks import all_finite
from lance_ref.engine.tensor import Shape


def check_kept(name: str, kept: np.ndarray, shape: Shape) -> None:
    """Raise NotFiniteError unless ``kept``, which a store computed from an activation of that shape, is finite.

    A NaN or an infinity of the activation is still there in every weighted sum over it. So it is enough to look at
    the sums, which are few.
    """
    if not all_finite(kept):
        raise NotFiniteError(
            f"{name}: an activation of shape {shape} contains NaN or infinity, or numbers too large for sums of "
            f"{kept.dtype}, expected finite numbers"
        )


OPS = ("linear", "conv2d", "conv_transpose2d", "conv3d")
"""The operations of all layers with weights: a store may keep their input in another form."""


class ActivationStore(ABC):
    """What to keep of an activation, and how to get a weight gradient out of it.

    One instance serves one layer. A new method is one subclass, and one cost rule in
    ``analysis/rules/stores/``.
    """

    name: str
    ops: Sequence[str] = OPS
    """The operations, among :data:`OPS`, whose input this store takes."""
    by_image = False
    """Whether images are independent: what is kept of one does not depend on the others, and the weight gradient of a
    batch is the sum of the gradients of its images. Then a step may take its batch in chunks (``chunk`` of ``fit``)."""
    energy_kept: float | None = None
    """Share of the last activation's energy that was kept; None for a store that does not measure it."""

    @abstractmethod
    def save(self, activation: np.ndarray) -> dict[str, np.ndarray]:
        """The arrays to keep on the tape, by name. Nothing else of ``activation`` is kept.

        One of them may be ``activation`` itself. A view of a part of it would keep its whole memory alive: return a
        copy instead.
        """

    def save_for(self, activation: np.ndarray, geometry: Geometry) -> dict[str, np.ndarray]:
        """:meth:`save` as a layer calls it, for stores that also need the geometry of the call."""
        return self.save(activation)

    @abstractmethod
    def weight_gradient(
        self, saved: Mapping[str, np.ndarray], grad_output: np.ndarray, geometry: Geometry
    ) -> np.ndarray:
        """The weight gradient, of the weight's shape, from what :meth:`save` returned."""

    def basis(self, groups: int, forward: str = "auto") -> Basis | None:
        """The directions in which every weight gradient of a layer with ``groups`` groups lies; None if there are none.

        ``forward`` is how a layer that trains in them computes its output (:class:`~lance_ref.algebra.basis.Basis`).
        """
        return None

    def update_gradient(
        self, saved: Mapping[str, np.ndarray], grad_output: np.ndarray, geometry: Geometry, basis: Basis
    ) -> np.ndarray:
        """The gradient of D for a weight W_0 + D ×₂ Q: by default the coordinates of the weight gradient."""
        return basis.coordinates(self.weight_gradient(saved, grad_output, geometry))

    def input_gradient(self, weight: np.ndarray, grad_output: np.ndarray, geometry: Geometry) -> np.ndarray:
        """The input gradient, of the input's shape. It needs nothing of the input, and is exact by default."""
        return geometry.input_gradient(weight, grad_output)

    def check(self, input_shape: Shape) -> None:  # noqa: B027  (most stores take any shape)
        """Raise ValueError if this store cannot take an activation of that shape."""

    def check_op(self, op: str) -> None:
        """Raise ValueError if this store does not take the input of that operation; names both."""
        if op not in self.ops:
            raise ValueError(f"{self.name} takes the inputs of {' and '.join(self.ops)}, not of {op}")

    def describe(self) -> dict[str, Any]:
        """What a trace says about this store; at least its name.

        Called after :meth:`save` where a step really runs, so that what varies from step to step (ranks)
        is that of this step.
        """
        return {"name": self.name}

    def settings(self) -> dict[str, Any]:
        """Settings that :meth:`describe` does not name and that a checkpoint compares. Default: none."""
        return {}

    @property
    def factor_bytes(self) -> int:
        """Bytes that training needs in memory in addition to the tape."""
        return 0

    def fixed(self) -> dict[str, np.ndarray]:
        """Arrays that never change and that every step depends on: a checkpoint compares them, and keeps none."""
        return {}

    def state(self) -> dict[str, np.ndarray]:
        """What the next step depends on beside the layer's input (random state, warm starts), for checkpoints."""
        return {}

    def load_state(self, state: Mapping[str, np.ndarray]) -> None:
        """Go on from what :meth:`state` returned."""
        if state:
            raise ValueError(f"store {self.name!r} has no state, but the checkpoint holds {sorted(state)}")


class Exact(ActivationStore):
    """Plain backpropagation: keep the activation itself."""

    name = "exact"
    by_image = True

    def save(self, activation: np.ndarray) -> dict[str, np.ndarray]:
        return {"activation": activation}

    def weight_gradient(
        self, saved: Mapping[str, np.ndarray], grad_output: np.ndarray, geometry: Geometry
    ) -> np.ndarray:
        return geometry.weight_gradient(saved["activation"], grad_output)


EXACT = Exact()
"""The default store of every layer; it has no state and is shared."""
