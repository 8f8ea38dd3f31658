"""This library as an adapter: every function of the kit through the paths that training takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lance_ref import functional as F
from lance_ref import nn
from lance_ref.algebra import tucker
from lance_ref.algebra.geometry import ConvGeometry, LinearGeometry
from lance_ref.algebra.subspace import Subspace, mode_names
from lance_ref.continual import bases
from lance_ref.continual.gpm import GPM
from lance_ref.continual.metrics import metrics as continual_metrics
from lance_ref.engine.counting import count_macs
from lance_ref.engine.tensor import Tensor
from lance_ref.lance.calibration import calibrate
from lance_ref.stores import Lance

Factors = Sequence[np.ndarray | None]
Geometry = Mapping[str, Any]


class NumpyAdapter:
    """The functions that ``docs/conformance.md`` specifies; ``order`` is that of the weight gradient."""

    order = "auto"

    # ---- a layer -------------------------------------------------------------------------------

    def forward(self, activation: np.ndarray, weight: np.ndarray, bias: np.ndarray, geometry: Geometry) -> np.ndarray:
        return _layer(Tensor(activation), Tensor(weight), Tensor(bias), geometry).data

    def input_gradient(self, weight: np.ndarray, grad_output: np.ndarray, geometry: Geometry) -> np.ndarray:
        activation = Tensor(np.zeros(geometry["input_shape"], weight.dtype), requires_grad=True)
        _layer(activation, Tensor(weight), None, geometry).backward(grad_output)
        return _gradient(activation)

    def bias_gradient(self, grad_output: np.ndarray, geometry: Geometry) -> np.ndarray:
        dtype = grad_output.dtype
        bias = Tensor(np.zeros(geometry["output_shape"][1 if geometry["kind"] == "conv" else -1], dtype), True)
        activation, weight = (Tensor(np.zeros(geometry[name], dtype)) for name in ("input_shape", "weight_shape"))
        _layer(activation, weight, bias, geometry).backward(grad_output)
        return _gradient(bias)

    def project(self, activation: np.ndarray, factors: Factors) -> np.ndarray:
        return self._store(activation.shape, factors, activation.dtype).save(activation)["core"]

    def weight_gradient(
        self, core: np.ndarray, factors: Factors, grad_output: np.ndarray, geometry: Geometry
    ) -> np.ndarray:
        store = self._store(tuple(geometry["input_shape"]), factors, core.dtype)
        return store.weight_gradient({"core": core}, grad_output, _geometry(geometry))

    def _store(self, shape: tuple[int, ...], factors: Factors, dtype: Any, order: str | None = None) -> Lance:
        exact = tuple(None if U is None else U.astype(np.float64) for U in factors)
        subspace = Subspace(shape, mode_names(shape), exact, (None,) * len(shape))
        return Lance(subspace, order=order or self.order, dtype=dtype)

    # ---- what it costs, measured -----------------------------------------------------------------

    def saved_bytes(self, activation: np.ndarray, factors: Factors) -> int:
        saved = self._store(activation.shape, factors, activation.dtype).save(activation)
        return sum(array.nbytes for array in saved.values())

    def projection_macs(self, activation: np.ndarray, factors: Factors) -> int:
        with count_macs() as counter:  # one mode after the other, as the specification bills it
            self._store(activation.shape, factors, activation.dtype, "separable").save(activation)
        return sum(counter.macs.values())

    def weight_gradient_macs(
        self, core: np.ndarray, factors: Factors, grad_output: np.ndarray, geometry: Geometry, order: str | None
    ) -> int:
        store = self._store(tuple(geometry["input_shape"]), factors, core.dtype, order)
        with count_macs() as counter:
            store.weight_gradient({"core": core}, grad_output, _geometry(geometry))
        return sum(counter.macs.values())

    # ---- subspaces -------------------------------------------------------------------------------

    def gram(self, activations: Sequence[np.ndarray], mode: int) -> np.ndarray:
        return np.sum([tucker.gram(A, mode) for A in activations], axis=0)

    def patch_gram(self, activations: Sequence[np.ndarray], geometry: Geometry) -> np.ndarray:
        C_out, C_in, k_h, k_w = geometry["weight_shape"]
        padding = tuple(map(tuple, geometry["padding"]))
        stride, dilation = tuple(geometry["stride"]), tuple(geometry["dilation"])
        net = nn.Sequential(nn.Conv2d(C_in, C_out, (k_h, k_w), stride, padding, dilation))
        net.to(activations[0].dtype)
        return bases.feature_gram(net, activations, "0")["0"].matrix

    def energy_rank(self, energies: np.ndarray, epsilon: float) -> int:
        return tucker.energy_rank(energies, epsilon)

    def leading_directions(self, gram: np.ndarray, epsilon: float) -> np.ndarray:
        energies, vectors = tucker.eigenbasis(gram)
        return vectors[:, : tucker.energy_rank(energies, epsilon)]

    def calibrate(
        self,
        activations: Sequence[np.ndarray],
        epsilon: float,
        modes: Sequence[bool],
        protected: np.ndarray,
        mean_free: bool,
    ) -> list[np.ndarray | None]:
        A = activations[0]
        layer = nn.Conv2d(A.shape[1], 1, 1) if A.ndim == 4 else nn.Linear(A.shape[-1], 1)
        net = nn.Sequential(layer).to(A.dtype)
        names = [name for name, compressed in zip(mode_names(A.shape), modes, strict=True) if compressed]
        calibration = calibrate(
            net, activations, "0", epsilon, names, False, protected={"0": protected}, mean_free=mean_free
        )
        return list(calibration["0"].factors)

    # ---- task after task -------------------------------------------------------------------------

    def update_protected(self, basis: np.ndarray, gram: np.ndarray, threshold: float) -> np.ndarray:
        return bases.update_protected(basis, gram, threshold).basis

    def task_subspace(self, gram: np.ndarray, basis: np.ndarray, epsilon: float) -> np.ndarray:
        return bases.task_subspace(gram, basis, epsilon)[0]

    def protected_gradient(self, grad_weight: np.ndarray, basis: np.ndarray) -> np.ndarray:
        shape = grad_weight.shape
        layer = nn.Linear(shape[1], shape[0]) if len(shape) == 2 else nn.Conv2d(shape[1], shape[0], shape[2:])
        net = nn.Sequential(layer).to(grad_weight.dtype)
        layer.weight.grad = grad_weight
        GPM(net, {"0": basis}).project()
        return _gradient(layer.weight)

    def metrics(self, accuracy: np.ndarray, initial: np.ndarray) -> dict[str, float]:
        return continual_metrics(accuracy, initial).as_dict()


def _layer(activation: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
    """The layer's output, through the library's differentiable functions."""
    if geometry["kind"] == "linear":
        return F.linear(activation, weight, bias)
    padding = tuple(map(tuple, geometry["padding"]))
    stride, dilation = tuple(geometry["stride"]), tuple(geometry["dilation"])
    return F.conv2d(
        activation, weight, bias, stride=stride, padding=padding, dilation=dilation, groups=geometry["groups"]
    )


def _geometry(geometry: Geometry) -> ConvGeometry | LinearGeometry:
    shapes = tuple(geometry["input_shape"]), tuple(geometry["weight_shape"])
    if geometry["kind"] == "linear":
        return LinearGeometry(*shapes)
    (top, bottom), (left, right) = geometry["padding"]
    stride, dilation = tuple(geometry["stride"]), tuple(geometry["dilation"])
    return ConvGeometry(*shapes, stride, ((top, bottom), (left, right)), dilation, geometry["groups"])


def _gradient(tensor: Tensor) -> np.ndarray:
    assert tensor.grad is not None
    return tensor.grad


adapter = NumpyAdapter()
