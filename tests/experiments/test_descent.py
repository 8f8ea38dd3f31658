"""What is true of the compressed gradient's direction, what is not, and that the measurement of it can tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import arrays, conv_geometries, linear_geometries

from experiments.descent import command as descent
from experiments.descent.cases import (
    EQUAL_SINGULAR_VALUES,
    EXAMPLES,
    FIXED_BATCH_MODE,
    GROUPS,
    HOSVD_4D,
    KINDS,
    Example,
    batch_mode_cases,
    both_gradients,
    chance,
    cosine,
    fixed_store,
    normal,
    one_mode_cases,
    random_geometry,
    same_batch_cases,
    sketch_cases,
    summary,
    worst_grad_output,
)
from lance_ref import F, Subspace, Tensor, calibrate, nn
from lance_ref.algebra.frame import feature_mode
from lance_ref.algebra.geometry import ConvGeometry, LinearGeometry
from lance_ref.stores import EXACT, Hosvd, Lance

# ---- by hand ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_are_what_they_say(name: str) -> None:
    """Each claimed dW and dŴ, worked out by hand, is what the layer and the store compute; they point apart."""
    example: Example = EXAMPLES[name]
    for U in example.factors:
        assert U is None or np.allclose(U.T @ U, np.eye(U.shape[1]))
    store = fixed_store(example.activation.shape, example.factors)
    exact, compressed = both_gradients(example.geometry, store, example.activation, example.grad_output)
    np.testing.assert_allclose(exact, example.exact, atol=1e-12)
    np.testing.assert_allclose(compressed, example.compressed, atol=1e-12)
    assert np.vdot(example.exact, example.compressed) <= -1


def test_calibration_gives_the_fixed_direction_of_the_example() -> None:
    """The example is no artefact of made-up factors: calibrate() on the batch (1, 0) finds U_1 = e_1."""
    net = nn.Sequential(nn.Linear(1, 1)).to(np.float64)
    subspace = calibrate(net, [np.array([[1.0], [0.0]])], layers="0", modes=("batch",))["0"]
    store = Lance(subspace, dtype=np.float64)
    example = FIXED_BATCH_MODE
    _, compressed = both_gradients(example.geometry, store, example.activation, example.grad_output)
    np.testing.assert_allclose(compressed, [[1.0]], atol=1e-12)


def test_a_fresh_hosvd_of_four_modes_can_point_against_the_gradient() -> None:
    """The store with the papers' ε finds the example's factors from the very batch: dW = −1, dŴ = 2."""
    example = HOSVD_4D
    store = Hosvd(0.7)
    exact, compressed = both_gradients(example.geometry, store, example.activation, example.grad_output)
    assert store.ranks == (1, None, 1, None)
    np.testing.assert_allclose([exact.item(), compressed.item()], [-1, 2], atol=1e-12)


def test_a_fresh_hosvd_of_two_modes_needs_distinct_singular_values() -> None:
    """Where they are equal the store's two directions need not belong together, and some G makes it negative."""
    example = EQUAL_SINGULAR_VALUES
    store = Hosvd(ranks=(1, 1))
    least, G = worst_grad_output(example.geometry, store, example.activation)
    exact, compressed = both_gradients(example.geometry, store, example.activation, G)
    assert np.vdot(exact, compressed) == pytest.approx(least)
    assert least < -0.1


# ---- claim 1: the feature mode alone ------------------------------------------------------------------


@given(g=st.one_of(conv_geometries(depthwise=False), linear_geometries()), seed=st.integers(0, 99), data=st.data())
def test_the_feature_mode_alone_is_an_orthogonal_projection(g: Any, seed: int, data: Any) -> None:
    """⟨dW, dŴ⟩ = ‖dŴ‖² for every linear layer, and every convolution of one group, at any rank."""
    assume(isinstance(g, LinearGeometry) or g.groups == 1)
    shape = g.input_shape
    assume(len(shape) > 1)
    mode = feature_mode(shape)
    ranks = [data.draw(st.integers(1, n)) if i == mode else None for i, n in enumerate(shape)]
    store = fixed_store(shape, Subspace.random(shape, ranks, np.random.default_rng(seed)).factors)
    x, _, grad_output = arrays(g, seed)
    exact, compressed = both_gradients(g, store, x, grad_output)
    tolerance = 1e-10 * np.sum(exact**2)
    assert np.vdot(exact, compressed) == pytest.approx(np.sum(compressed**2), rel=1e-9, abs=tolerance)


@pytest.mark.parametrize("groups", [2, 4])
def test_groups_break_the_projection(groups: int) -> None:
    """With groups there are output gradients that make it negative, for almost every subspace of channels."""
    g = ConvGeometry((2, 4, 2, 2), (4, 4 // groups, 1, 1), groups=groups)
    rng = np.random.default_rng(groups)
    store = fixed_store(g.input_shape, Subspace.random(g.input_shape, (None, 2, None, None), rng).factors)
    x, _ = normal(g, rng)
    least, G = worst_grad_output(g, store, x)
    assert least < -0.01
    assert cosine(*both_gradients(g, store, x, G)) < -0.01
    assert cosine(GROUPS.exact, GROUPS.compressed) == -1


# ---- claims 2 to 4: when all G are safe -----------------------------------------------------------------


@given(seed=st.integers(0, 9999), data=st.data())
def test_safe_for_every_gradient_exactly_if_the_projections_commute(seed: int, data: Any) -> None:
    """Least ⟨dW, dŴ⟩ over G is 0 where Q K = K Q, and below 0 elsewhere: the criterion, for any fixed factors."""
    B, I = data.draw(st.integers(2, 5)), data.draw(st.integers(1, 5))  # noqa: E741
    g, rng = LinearGeometry((B, I), (1, I)), np.random.default_rng(seed)
    A, _ = normal(g, rng)
    u, _, vt = np.linalg.svd(A)
    rank = min(B, I)
    r1, r2 = data.draw(st.integers(1, B)), data.draw(st.integers(1, rank))
    commuting = data.draw(st.booleans())
    U = u[:, rng.permutation(B)[:r1]] if commuting else np.linalg.qr(rng.standard_normal((B, r1)))[0]
    V = vt.T[:, rng.permutation(rank)[:r2]] if commuting else np.linalg.qr(rng.standard_normal((I, r2)))[0]
    Q, K = U @ U.T, A @ V @ V.T @ A.T
    apart = np.linalg.norm(Q @ K - K @ Q) / np.linalg.norm(K)
    least, _ = worst_grad_output(g, fixed_store(A.shape, (U, V)), A)
    if commuting or r1 == B:
        assert apart < 1e-12
        assert least > -1e-12 * np.sum(A**2)
    else:
        # Q K's symmetric part has the block Q K (I − Q) beside a block of zeros: an eigenvalue of −‖·‖²/‖K‖ at least
        assert least < -1e-3 * apart**2 * np.linalg.norm(K)


@given(seed=st.integers(0, 9999), data=st.data())
def test_hosvd_of_the_very_batch_is_a_projection_in_two_modes(seed: int, data: Any) -> None:
    """dŴ = dW V_k V_kᵀ with k the smaller rank, so ⟨dW, dŴ⟩ = ‖dŴ‖² ≥ 0, for every G."""
    B, I, O = (data.draw(st.integers(1, 6)) for _ in range(3))  # noqa: E741
    r1, r2 = data.draw(st.integers(1, B)), data.draw(st.integers(1, I))
    g, rng = LinearGeometry((B, I), (O, I)), np.random.default_rng(seed)
    A, G = normal(g, rng)
    store = Hosvd(ranks=(r1, r2))
    exact, compressed = both_gradients(g, store, A, G)
    V = np.linalg.svd(A)[2].T[:, : min(r1, r2)]
    np.testing.assert_allclose(compressed, exact @ V @ V.T, atol=1e-7 * np.linalg.norm(exact))
    assert np.vdot(exact, compressed) >= -1e-9 * np.sum(exact**2)
    assert worst_grad_output(LinearGeometry((B, I), (1, I)), store, A)[0] > -1e-7 * np.sum(A**2)


@pytest.mark.parametrize("kind", KINDS[1:4])
def test_hosvd_of_the_very_batch_is_no_projection_in_more_modes(kind: str) -> None:
    """Tokens or pixels beside the batch: for most random activations some G makes it negative."""
    (row,) = [row for row in same_batch_cases(100, np.random.default_rng(0)) if row["layer"] == kind]
    assert row["worst_G"]["negative"] >= 0.4  # of 5
    assert row["worst_G"]["least"] < -0.3


# ---- how often -------------------------------------------------------------------------------------------


def test_single_modes_at_random() -> None:
    """Never with the feature mode of a layer without groups; of the other modes, sometimes."""
    rows = {(row["layer"], row["mode"]): row for row in one_mode_cases(60, np.random.default_rng(0))}
    assert len(rows) == 2 + 3 + 4 * 4
    safe = [row for (kind, mode), row in rows.items() if kind in KINDS[:4] and mode in ("feature", "channel")]
    assert len(safe) == 4
    assert all(row["least"] >= 0 for row in safe)
    assert rows["linear (B, I)", "batch"]["negative"] > 0
    assert rows["linear (B, L, I)", "token"]["negative"] > 0


def test_how_often_noise_misleads() -> None:
    """One weight: 1/4 at r = B/2 and 1/3 at r = B/4, in closed form and counted; with the very batch never."""
    assert chance(8, 4, 1) == pytest.approx(1 / 4, abs=1e-12)
    assert chance(8, 2, 1) == pytest.approx(1 / 3, abs=1e-12)
    trials = 150
    rows = list(batch_mode_cases(trials, np.random.default_rng(1), (8,)))
    assert {(row["rank"], row["alignment"]) for row in rows} == {(r, a) for r in (1, 2, 4) for a in (0, 0.5, 0.9, 1)}
    for row in rows:
        if row["alignment"] == 1:
            assert row["negative"] == 0
        if row["alignment"] == 0 and row["in"] == 1:
            sigma = np.sqrt(row["chance"] * (1 - row["chance"]) / trials)
            assert abs(row["negative"] - row["chance"]) < 4 * sigma
    at = {(row["in"], row["rank"], row["alignment"]): row["negative"] for row in rows}
    assert at[1, 2, 0.0] > at[1, 2, 0.9] > at[1, 2, 1.0]


def test_a_sketch_misleads_as_often_and_has_no_bias() -> None:
    """A single draw is negative as often as a fixed direction on noise; the mean of many draws is dW."""
    trials = 150
    for row in sketch_cases(trials, np.random.default_rng(2), (4,)):
        assert 0 <= row["bias"] < 4
        if row["in"] == 1:
            assert abs(row["negative"] - row["chance"]) < 4 * np.sqrt(row["chance"] * (1 - row["chance"]) / trials)


@pytest.mark.parametrize("kind", KINDS)
def test_random_layers_are_valid(kind: str) -> None:
    """Shapes fit each other, and every mode can be cut."""
    for seed in range(20):
        g = random_geometry(kind, np.random.default_rng(seed))
        assert min(g.input_shape) >= 2
        assert g.forward(*arrays(g, seed)[:2]).shape == g.output_shape


def test_the_measures_can_tell() -> None:
    """Planted: opposite, orthogonal and zero gradients, and a negative share that rounding must not make."""
    e = np.eye(2)
    assert cosine(e[0], -3 * e[0]) == -1
    assert cosine(e[0], e[1]) == 0
    assert cosine(e[0], 0 * e[0]) == 0
    assert cosine(np.float32([1e-30, 0]), np.float32([1e-30, 0])) == pytest.approx(1), "float32 would underflow"
    counted = summary([-1.0, -1e-12, 0.5, 1.0])
    assert counted == {"trials": 4, "negative": 0.25, "least": -1.0, "median": 0.25}


# ---- training, and the command ------------------------------------------------------------------------------


def test_beside_is_what_a_second_backward_with_the_exact_store_gives() -> None:
    """The recorded cosine is that of the two gradients of one batch, from two separate backward passes."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((6, 3, 5, 5)), rng.integers(0, 4, 6)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, rng=0),
        nn.ReLU(),
        nn.Conv2d(4, 2, 3, rng=1),
        nn.Flatten(),
        nn.Linear(18, 4, rng=2),
    ).to(np.float64)

    def gradients() -> list[np.ndarray]:
        net.zero_grad()
        F.cross_entropy(net(Tensor(x)), y).backward()
        return [net[i].weight.grad.copy() for i in (0, 2)]

    exact = gradients()
    besides = [descent.Beside(Hosvd(0.6)), descent.Beside(Hosvd(0.6))]
    net[0].store, net[2].store = besides
    watched = gradients()
    net[0].store, net[2].store = Hosvd(0.6), Hosvd(0.6)
    compressed = gradients()
    for beside, a, b, c in zip(besides, exact, watched, compressed, strict=True):
        np.testing.assert_allclose(b, c, rtol=1e-12, atol=1e-14)
        assert beside.cosines == [pytest.approx(cosine(a, b), abs=1e-12)]
        assert 0 < beside.cosines[0] < 0.999
    net[0].store = net[2].store = EXACT


def test_a_quick_run_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every part has rows, exact gradients have cosine 1, the channel mode none below 0; same seed, same numbers."""
    output, figure = tmp_path / "descent.json", tmp_path / "descent.png"
    assert descent.main(["--quick", "--trials", "5", "--output", str(output), "--figure", str(figure)]) == 0
    result = json.loads(output.read_text(encoding="utf-8"))
    assert {"command", "seed", "versions", "machine", "threads"} <= set(result)
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"descent.json", "descent.png"}
    assert all(result[part] for part in ("one_mode", "batch_mode", "same_batch", "sketch"))
    training = {(row["method"], row["modes"]): row["layers"] for row in result["training"]}
    assert set(training) == set(descent.METHODS)
    for (method, modes), layers in training.items():
        assert list(layers) == ["conv1", "conv2", "conv3"]
        for row in layers.values():
            assert row["trials"] == 4
            if method == "BP":
                assert row["least"] == pytest.approx(1, abs=1e-5)
            if modes == "channel only":
                assert row["negative"] == 0
    assert training["LANCE", "all modes"]["conv2"]["median"] < 0.99
    printed = capsys.readouterr().out
    assert "cosine -1.000" in printed
    again = descent.train("LANCE", "all modes", 1, 256, 0)
    assert again["cosines"] == next(row["cosines"] for row in result["training"] if row["modes"] == "all modes")


def test_the_committed_figures_are_of_this_code() -> None:
    """The committed file has this code's examples and methods, and says what the documentation takes from it."""
    path = Path(descent.__file__).parents[1] / "results" / "descent.json"
    result = json.loads(path.read_text(encoding="utf-8"))
    assert result["examples"] == descent.examples()
    assert [(row["method"], row["modes"]) for row in result["training"]] == list(descent.METHODS)
    assert (result["trials"], result["epochs"]) == (descent.FULL["trials"], descent.FULL["epochs"])
    by_layer = {row["layer"]: row for row in result["same_batch"]}
    assert by_layer["linear (B, I)"]["worst_G"]["negative"] == 0
    assert by_layer["1x1 convolution"]["worst_G"]["negative"] > 0.5
    assert path.with_suffix(".png").is_file()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--trials", "0"], "--trials is 0"),
        (["--epochs", "-1"], "--epochs is -1"),
        (["--seed", "-1"], "--seed is -1"),
        (["--output", "no/such/folder/run.json"], "no/such/folder"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Exit code 2 and one line on stderr that names what came."""
    with pytest.raises(SystemExit) as ended:
        descent.main(["--quick", *arguments])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert says in error
    with pytest.raises(SystemExit) as stopped:
        descent.main(["--no-such-option"])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
