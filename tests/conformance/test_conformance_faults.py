"""Planted faults: each wrong implementation, and each wrong kind of result, fails at least one check of the kit."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lance_ref.algebra import projection
from lance_ref.conformance import Kit, check, definitions, make_kit
from lance_ref.conformance.numpy_adapter import NumpyAdapter, adapter

Fault = Callable[..., Any]


@pytest.fixture(scope="module")
def kit() -> Kit:
    return make_kit()


def turned(factors: Any) -> list[Any]:
    """Every square factor transposed: the shapes still fit."""
    return [U if U is None or U.shape[0] != U.shape[1] else np.ascontiguousarray(U.T) for U in factors]


def swapped(option: str) -> Fault:
    """Height's setting used for width, and the other way round."""

    def forward(activation: Any, weight: Any, bias: Any, geometry: Any) -> Any:
        return adapter.forward(activation, weight, bias, {**geometry, option: geometry[option][::-1]})

    return forward


def sides_swapped(weight: Any, grad_output: Any, geometry: Any) -> Any:
    if geometry["kind"] == "conv":
        geometry = {**geometry, "padding": [sides[::-1] for sides in geometry["padding"]]}
    return adapter.input_gradient(weight, grad_output, geometry)


def kernel_not_turned(weight: Any, grad_output: Any, geometry: Any) -> Any:
    weight = weight[:, :, ::-1, ::-1].copy() if weight.ndim == 4 else weight
    return adapter.input_gradient(weight, grad_output, geometry)


def wrong_axis_of_bias(grad_output: Any, geometry: Any) -> Any:
    return grad_output.sum(axis=tuple(range(1, grad_output.ndim)))


def wrong_axis_of_token_bias(grad_output: Any, geometry: Any) -> Any:
    if grad_output.ndim != 3:
        return adapter.bias_gradient(grad_output, geometry)
    return grad_output.sum(axis=(0, 2))


def batch_forgotten_in_projection(activation: Any, factors: Any) -> Any:
    return adapter.project(activation, [None, *factors[1:]])


def batch_forgotten_in_gradient(core: Any, factors: Any, grad_output: Any, geometry: Any) -> Any:
    full = factors[0] is not None and factors[0].shape[0] == factors[0].shape[1]  # otherwise its shape would tell
    return adapter.weight_gradient(core, [None, *factors[1:]] if full else factors, grad_output, geometry)


def first_group_for_all(core: Any, factors: Any, grad_output: Any, geometry: Any) -> Any:
    if geometry["kind"] == "conv" and factors[1] is not None:
        width = geometry["weight_shape"][1]
        factors = [factors[0], np.tile(factors[1][:width], (geometry["groups"], 1)), *factors[2:]]
    return adapter.weight_gradient(core, factors, grad_output, geometry)


def mean_over_the_batch(core: Any, factors: Any, grad_output: Any, geometry: Any) -> Any:
    return adapter.weight_gradient(core, factors, grad_output, geometry) / np.array(len(grad_output), core.dtype)


def factors_kept_too(activation: Any, factors: Any) -> int:
    return adapter.saved_bytes(activation, factors) + sum(U.nbytes for U in factors if U is not None)


def billed_as_in_the_papers(activation: Any, factors: Any) -> int:
    return activation.size * sum(U.shape[1] for U in factors if U is not None)


def flops_for_macs(**arguments: Any) -> int:
    return 2 * adapter.weight_gradient_macs(**arguments)


def first_batch_heavy(activations: Any, epsilon: Any, modes: Any, protected: Any, mean_free: Any) -> Any:
    """A running mean of Gram matrices that begins with the mode's dimension for a count."""
    factors: list[Any] = []
    for mode, compressed in enumerate(modes):
        heavy = [activations[0] * np.sqrt(activations[0].shape[mode]).astype(activations[0].dtype), *activations[1:]]
        alone = [compressed and m == mode for m in range(len(modes))]
        factors.append(adapter.calibrate(heavy, epsilon, alone, protected, mean_free)[mode] if compressed else None)
    return factors


def batches_weigh_the_same(activations: Any, **rest: Any) -> Any:
    """Each batch's mean over its samples, whatever their number."""
    return adapter.calibrate([A / np.sqrt(len(A)).astype(A.dtype) for A in activations], **rest)


def option(**changed: Any) -> Fault:
    """calibrate that ignores an option."""
    return lambda **arguments: adapter.calibrate(**{**arguments, **changed})


def mean_of_means(activations: Any, epsilon: Any, modes: Any, protected: Any, mean_free: Any) -> Any:
    if not mean_free:
        return adapter.calibrate(activations, epsilon, modes, protected, False)
    feature = 1 if activations[0].ndim == 4 else activations[0].ndim - 1
    means = [A.mean(axis=tuple(m for m in range(A.ndim) if m != feature), dtype=np.float64) for A in activations]
    M = np.hstack([protected, definitions.orthonormal(np.mean(means, axis=0)[:, None], protected)])
    return adapter.calibrate(activations, epsilon, modes, M, False)


def mean_gram(activations: Any, mode: int) -> Any:
    return adapter.gram(activations, mode) / sum(A.size // A.shape[mode] for A in activations)


def kernel_first(activations: Any, geometry: Any) -> Any:
    """Patches as (k_h, k_w, C) instead of (C, k_h, k_w)."""
    K = adapter.patch_gram(activations, geometry)
    order = np.arange(len(K)).reshape(geometry["weight_shape"][1:]).transpose(1, 2, 0).ravel()
    return K[np.ix_(order, order)]


def singular_values(energies: Any, epsilon: Any) -> int:
    return adapter.energy_rank(np.sqrt(energies), epsilon)


def strictly_more(energies: Any, epsilon: Any) -> int:
    kept = np.cumsum(energies) / energies.sum()
    return min(int(np.argmax(kept > epsilon)) + 1 if (kept > epsilon).any() else len(kept), len(kept))


def zeros_left_out(energies: Any, epsilon: Any) -> int:
    return adapter.energy_rank(energies[energies > 0], epsilon)


def smallest_first(gram: Any, epsilon: Any) -> Any:
    vectors = np.linalg.eigh(gram)[1]
    return vectors[:, : adapter.leading_directions(gram, epsilon).shape[1]]


def singular_values_of_gram(gram: Any, epsilon: Any) -> Any:
    energies, vectors = np.linalg.eigh(gram)
    return vectors[:, ::-1][:, : adapter.energy_rank(np.sqrt(energies.clip(0))[::-1], epsilon)]


def share_of_what_is_left(basis: Any, gram: Any, threshold: float) -> Any:
    """The threshold relative to the residual energy."""
    energies, vectors = definitions.outside(gram, basis)
    if energies.sum() <= 1e-12 * np.trace(gram):
        return basis
    k = int(np.argmax(np.cumsum(energies) >= (threshold - 1e-12) * energies.sum())) + 1
    return np.hstack([basis, vectors[:, :k]])


def residual_forgotten(basis: Any, gram: Any, threshold: float) -> Any:
    """New directions of the task itself instead of what the basis leaves of it."""
    added = adapter.update_protected(basis, gram, threshold).shape[1] - basis.shape[1]
    return np.hstack([basis, np.linalg.eigh(gram)[1][:, ::-1][:, :added]])


def basis_forgotten(gram: Any, basis: Any, epsilon: float) -> Any:
    return adapter.task_subspace(gram, basis[:, :0], epsilon)


def share_of_everything(gram: Any, basis: Any, epsilon: float) -> Any:
    """ε relative to all energy instead of that outside the basis."""
    energies, vectors = definitions.outside(gram, basis)
    kept = np.cumsum(energies) / np.trace(gram)
    return vectors[:, : min(int((kept < epsilon).sum()) + 1, len(kept))]


def along_instead_of_outside(grad_weight: Any, basis: Any) -> Any:
    return grad_weight - adapter.protected_gradient(grad_weight, basis)


def metric(**changed: Callable[[Any, Any], float]) -> Fault:
    """One of the three wrong."""

    def metrics(accuracy: Any, initial: Any) -> Any:
        wrong = {name: float(change(accuracy, initial)) for name, change in changed.items()}
        return {**adapter.metrics(accuracy, initial), **wrong}

    return metrics


def in_less(reduced: Callable[[Any], Any]) -> Fault:
    """A layer whose inputs are rounded first."""

    def forward(activation: Any, weight: Any, bias: Any, geometry: Any) -> Any:
        rounded = (reduced(array).astype(array.dtype) for array in (activation, weight))
        return adapter.forward(*rounded, bias, geometry)

    return forward


def float32_inside(**arguments: Any) -> Any:
    single = {name: a.astype(np.float32) if name != "geometry" else a for name, a in arguments.items()}
    return adapter.forward(**single).astype(arguments["weight"].dtype)


def tf32(array: Any) -> Any:
    """float32 with ten bits behind the point, as some tensor cores multiply."""
    return (array.astype(np.float32).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


FAULTS: dict[str, tuple[str, Fault]] = {
    "TF32": ("forward", in_less(tf32)),
    "float32 inside of float64": ("forward", float32_inside),
    "stride of the other axis": (
        "forward",
        lambda **a: swapped("stride")(**a) if a["weight"].ndim == 4 else adapter.forward(**a),
    ),
    "dilation of the other axis": (
        "forward",
        lambda **a: swapped("dilation")(**a) if a["weight"].ndim == 4 else adapter.forward(**a),
    ),
    "bias left out": ("forward", lambda **a: adapter.forward(**{**a, "bias": 0 * a["bias"]})),
    "padding of the other side": ("input_gradient", sides_swapped),
    "kernel not turned": ("input_gradient", kernel_not_turned),
    "bias over the wrong axis": ("bias_gradient", wrong_axis_of_bias),
    "token bias over the wrong axis": ("bias_gradient", wrong_axis_of_token_bias),
    "transposed factor": ("project", lambda activation, factors: adapter.project(activation, turned(factors))),
    "transposed factor in the gradient": (
        "weight_gradient",
        lambda core, factors, grad_output, geometry: adapter.weight_gradient(
            core, turned(factors), grad_output, geometry
        ),
    ),
    "batch mode forgotten": ("project", batch_forgotten_in_projection),
    "batch mode forgotten in the gradient": ("weight_gradient", batch_forgotten_in_gradient),
    "first group's rows for all": ("weight_gradient", first_group_for_all),
    "mean over the batch": ("weight_gradient", mean_over_the_batch),
    "factors counted": ("saved_bytes", factors_kept_too),
    "bytes of float32": ("saved_bytes", lambda activation, factors: adapter.project(activation, factors).size * 4),
    "paper's projection": ("projection_macs", billed_as_in_the_papers),
    "FLOPs": ("weight_gradient_macs", flops_for_macs),
    "the cheaper order": ("weight_gradient_macs", lambda **a: adapter.weight_gradient_macs(**{**a, "order": "auto"})),
    "first batch heavy": ("calibrate", first_batch_heavy),
    "batches of any size weigh the same": ("calibrate", batches_weigh_the_same),
    "only the first batch": ("calibrate", lambda **a: adapter.calibrate(**{**a, "activations": a["activations"][:1]})),
    "protected directions ignored": (
        "calibrate",
        lambda **a: adapter.calibrate(**{**a, "protected": a["protected"][:, :0]}),
    ),
    "mean not left out": ("calibrate", option(mean_free=False)),
    "mean of the batches' means": ("calibrate", mean_of_means),
    "batch mode not calibrated": ("calibrate", lambda **a: [None, *adapter.calibrate(**a)[1:]]),
    "mean Gram": ("gram", mean_gram),
    "last batch only": ("gram", lambda activations, mode: adapter.gram(activations[-1:], mode)),
    "kernel before channels": ("patch_gram", kernel_first),
    "singular values": ("energy_rank", singular_values),
    "more than the threshold": ("energy_rank", strictly_more),
    "zeros left out at full rank": ("energy_rank", zeros_left_out),
    "smallest directions": ("leading_directions", smallest_first),
    "singular values of a Gram": ("leading_directions", singular_values_of_gram),
    "share of what is left": ("update_protected", share_of_what_is_left),
    "residual forgotten": ("update_protected", residual_forgotten),
    "basis forgotten": ("task_subspace", basis_forgotten),
    "share of all energy": ("task_subspace", share_of_everything),
    "along instead of outside": ("protected_gradient", along_instead_of_outside),
    "BWT divided by T": ("metrics", metric(bwt=lambda R, b: (R[-1] - np.diag(R)).sum() / len(R))),
    "FWT without the random net": ("metrics", metric(fwt=lambda R, b: np.diag(R, 1).mean())),
    "ACC of the diagonal": ("metrics", metric(acc=lambda R, b: np.diag(R).mean())),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_caught(kit: Kit, fault: str) -> None:
    """A wrong implementation of one function fails at least one of its checks, for its result and not by an error."""
    function, wrong = FAULTS[fault]
    faulty = NumpyAdapter()
    setattr(faulty, function, wrong)
    failed = [one for one in check(faulty, kit, f"*/{function}") if one.status == "failed"]
    assert failed
    raised = [one for one in failed if one.reason.startswith("raised")]
    assert len(raised) < len(failed), raised[0].reason


def test_a_wrong_stride_in_the_separable_order_is_caught(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """Factor rows shifted without the stride have the right shape, and only the values tell."""
    original = projection.shifted_rows

    def unstrided(factor: Any, geometry: Any, axis: int) -> Any:
        dense = dataclasses.replace(geometry, stride=(1, 1))
        return original(factor, dense, axis)[: geometry.output_size[axis]]

    separable = NumpyAdapter()
    separable.order = "separable"
    monkeypatch.setattr(projection, "shifted_rows", unstrided)
    failed = {one.case for one in check(separable, kit, "conv_*/weight_gradient") if one.status == "failed"}
    assert {"conv_stride.float32", "conv_stride.float64", "conv_everything.float64"} <= failed
    assert "conv_plain.float64" not in failed


RESULTS: dict[str, tuple[Fault, str]] = {
    "raises": (lambda G: 1 / 0, "raised ZeroDivisionError: division by zero"),
    "leaves": (lambda G: exit(0), "raised SystemExit: 0"),
    "nothing": (lambda G: None, "returned None, expected a numpy.ndarray"),
    "list": (lambda G: G.sum(axis=0).tolist(), "returned a list of 4, expected a numpy.ndarray"),
    "shape": (lambda G: G.sum(axis=0)[:, None], "returned shape (4, 1), expected (4,)"),
    "dtype": (lambda G: G.sum(axis=0).astype(np.int64), "returned dtype int64, expected float"),
    "objects": (lambda G: G.sum(axis=0).astype(object), "returned dtype object, expected float"),
    "half": (lambda G: G.sum(axis=0).astype(np.float16), "returned dtype float16, expected float"),
    "NaN": (lambda G: G.sum(axis=0) * np.array(np.nan, G.dtype), "returned 4 entries that are NaN or infinite"),
    "infinity": (lambda G: G.sum(axis=0) + np.array([0, 0, 0, np.inf], G.dtype), "returned 1 entries"),
    "far off": (lambda G: G.sum(axis=0) * np.array(1.01, G.dtype), "relative error 0.01 at ["),
}


@pytest.mark.parametrize("what", RESULTS)
def test_a_result_of_the_wrong_kind_is_a_failed_case(kit: Kit, what: str) -> None:
    """Whatever an adapter raises or returns, the check goes on and says why it failed."""
    result, reason = RESULTS[what]
    faulty = NumpyAdapter()
    faulty.bias_gradient = lambda grad_output, geometry: result(grad_output)  # type: ignore[method-assign]
    outcomes = check(faulty, kit, "linear.*/bias_gradient")
    assert [one.status for one in outcomes] == ["failed", "failed"]
    assert all(one.reason.startswith(reason) for one in outcomes), outcomes[0].reason


@pytest.mark.parametrize("value", [12.0, True, "12", None, np.float32(12)])
def test_an_integer_is_an_integer(kit: Kit, value: Any) -> None:
    """A cost that is no integer was not counted."""
    faulty = NumpyAdapter()
    faulty.saved_bytes = lambda activation, factors: value  # type: ignore[method-assign]
    (outcome,) = check(faulty, kit, "linear.float32/saved_bytes")
    assert outcome.reason.endswith("expected an integer")


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (0.5, "returned 0.5 (float), expected a mapping with 'acc', 'bwt', 'fwt'"),
        ({"bwt": 0}, "returned no 'acc', only 'bwt'"),
        ({"acc": "1", "bwt": 0, "fwt": 0}, "'acc' is a str, expected a number"),
        ({"acc": float("nan"), "bwt": 0, "fwt": 0}, "'acc' is nan, expected 0."),
    ],
)
def test_numbers_are_numbers(kit: Kit, value: Any, reason: str) -> None:
    """Metrics that are missing, text or NaN have failed."""
    faulty = NumpyAdapter()
    faulty.metrics = lambda accuracy, initial: value  # type: ignore[method-assign]
    (outcome,) = check(faulty, kit, "metrics_2_*")
    assert outcome.status == "failed"
    assert outcome.reason.startswith(reason)


def test_bases_are_compared_as_subspaces(kit: Kit) -> None:
    """Signs and rotations of the columns are free; other lengths, skewness and another span are not."""
    rng = np.random.default_rng(0)

    def outcome(change: Callable[[Any], Any]) -> Any:
        faulty = NumpyAdapter()
        faulty.leading_directions = lambda gram, epsilon: change(  # type: ignore[method-assign]
            adapter.leading_directions(gram, epsilon)
        )
        (one,) = check(faulty, kit, "directions_high.*")
        return one

    rotation = np.linalg.qr(rng.standard_normal((3, 3)))[0]
    assert outcome(lambda U: U @ rotation).status == "passed"
    assert outcome(lambda U: -U).status == "passed"
    assert outcome(lambda U: 1.01 * U).reason.startswith("the columns are not orthonormal")
    assert outcome(lambda U: np.linalg.qr(rng.standard_normal(U.shape))[0]).reason.startswith("spans another subspace")
    assert outcome(lambda U: U[:, :-1]).reason == "returned shape (7, 2), expected (7, 3)"


def test_arguments_are_copies(kit: Kit) -> None:
    """An adapter that works in place spoils neither the next call nor the expected values."""
    careless = NumpyAdapter()

    def in_place(activation: Any, factors: Any) -> Any:
        core = adapter.project(activation, factors)
        activation *= 0
        for U in factors:
            if U is not None:
                U *= 0
        return core

    careless.project = in_place  # type: ignore[method-assign]
    for _ in range(2):
        outcomes = check(careless, kit, "conv_plain.*")
        assert {one.status for one in outcomes} == {"passed"}
