"""Calibration: exact sums of Grams in one streaming pass, ranks at any threshold, files, and clear refusals."""

from __future__ import annotations

import gc
import io
import sys
import weakref
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from small_nets import ThreeLayers, Tokens, assert_same, batches, layer_inputs

from lance_ref import Subspace, Tensor, calibrate, compress, count_macs, nn, tune
from lance_ref.algebra.grams import LayerGrams
from lance_ref.algebra.modes import unfold
from lance_ref.stores import EXACT

MODES = ("batch", "channel", "height", "width")


def stacked(net: ThreeLayers, data: list[np.ndarray], path: str, mode: int) -> np.ndarray:
    """The mode-n unfoldings of all batches side by side: its SVD is the reference for spectra and factors."""
    return np.concatenate([unfold(layer_inputs(net, x)[path], mode) for x in data], axis=1)


# ---- what is computed ------------------------------------------------------------------


@pytest.mark.parametrize("path", ["conv1", "conv2", "head"])
def test_factors_and_spectra_are_those_of_all_batches_together(path: str) -> None:
    """Grams summed over batches = one SVD of all unfoldings side by side: a forgotten batch or weight shows."""
    net, data = ThreeLayers(), batches()
    space = calibrate(net, data, epsilon=0.8)[path]
    assert space.shape == layer_inputs(net, data[0])[path].shape
    assert (space.samples, space.batches, space.epsilon) == (15, 3, 0.8)
    for mode, (U, spectrum) in enumerate(zip(space.factors, space.spectra, strict=True)):
        assert U is not None
        assert spectrum is not None
        V, singular, _ = np.linalg.svd(stacked(net, data, path, mode), full_matrices=False)
        assert_allclose(spectrum[: len(singular)], singular**2, rtol=1e-10, atol=1e-10)
        r = U.shape[1]
        assert_allclose(U @ U.T, V[:, :r] @ V[:, :r].T, atol=1e-8)


@given(epsilon=st.floats(0.05, 1), seed=st.integers(0, 20))
def test_factors_are_orthonormal_and_ranks_are_the_smallest(epsilon: float, seed: int) -> None:
    """Energy ≥ ε, rank − 1 misses it, UᵀU = 1; and energy_kept says what the factors really keep."""
    net, data = ThreeLayers(), batches(seed=seed)
    calibration = calibrate(net, data, epsilon=epsilon)
    for path, space in calibration.items():
        for mode, (U, kept) in enumerate(zip(space.factors, space.energy_kept, strict=True)):
            assert U is not None
            assert kept is not None
            assert_allclose(U.T @ U, np.eye(U.shape[1]), atol=1e-12)
            unfolded = stacked(net, data, path, mode)
            energy = np.linalg.norm(unfolded) ** 2
            assert_allclose(np.linalg.norm(U.T @ unfolded) ** 2 / energy, kept, rtol=1e-10)
            assert kept >= epsilon - 1e-12
            if U.shape[1] > 1 and epsilon < 1:
                assert np.linalg.norm(U[:, :-1].T @ unfolded) ** 2 < epsilon * energy * (1 + 1e-12)


def test_epsilon_one_is_full_rank_exactly() -> None:
    """Also where the data leave directions without energy: one image repeated has batch rank 1."""
    net = ThreeLayers()
    x = np.repeat(batches(1, B=1)[0], 5, axis=0)
    calibration = calibrate(net, [x], epsilon=1)
    assert {path: space.ranks for path, space in calibration.items()} == {
        "conv1": (5, 2, 7, 5),
        "conv2": (5, 4, 4, 3),
        "head": (5, 6),
    }
    assert calibration.with_epsilon(0.999)["conv1"].ranks[0] == 1


def test_float32_activations_are_summed_in_float64() -> None:
    """Large and tiny batches in turn: a float32 sum would lose the tiny ones."""
    net = nn.Sequential(nn.Linear(2, 2, rng=np.random.default_rng(0)))
    data = [np.array([[1e4, 0]], np.float32), *[np.array([[0, 1]], np.float32)] * 3]
    spectrum = calibrate(net, data)["0"].spectra[1]
    assert spectrum is not None
    assert_array_equal(spectrum, [1e8, 3])


def test_grams_that_grow_forget_their_eigenvectors() -> None:
    """Directions are computed once, but not before the last batch."""
    grams = LayerGrams("fc", (2, 2), (False, True))
    grams.add(np.array([[3.0, 0.0], [0.0, 1.0]]))
    assert_array_equal(grams.basis(1)[0], [9, 1])
    assert grams.basis(1) is grams.basis(1)
    grams.add(np.array([[0.0, 4.0], [0.0, 0.0]]))
    assert_array_equal(grams.basis(1)[0], [17, 9])


def test_a_layer_called_twice_contributes_both_inputs() -> None:
    """Shared layers see every call, here x and its image, but there is one batch of four."""
    layer = nn.Linear(3, 3, rng=np.random.default_rng(0)).to(np.float64)
    x = np.random.default_rng(1).standard_normal((4, 3))
    calibration = calibrate(nn.Sequential(layer, layer), [x], epsilon=1)
    space = calibration["0"]
    assert (space.samples, space.batches) == (4, 1)
    for text in (str(calibration), repr(calibration), str(space)):
        assert "4 samples in 1 batch" in text
        assert "batches" not in text
    assert calibrate(nn.Sequential(layer, layer), [x, x[:2]], modes=["feature"])["0"].samples == 6
    both = np.concatenate([x, layer(x).detach().data])
    spectrum = space.spectra[1]
    assert spectrum is not None
    assert_allclose(spectrum, np.linalg.svd(both, compute_uv=False) ** 2, rtol=1e-10)


def test_multiply_adds_are_booked_as_calibration_under_the_layer() -> None:
    """Σ_n size·n for every batch, on top of an unchanged forward pass."""
    net, data = ThreeLayers(), batches(2)
    with count_macs() as plain:
        net.eval()(data[0])
    with count_macs() as counter:
        calibrate(net, data)
    for path, x in layer_inputs(net, data[0]).items():
        assert counter.by_layer(path)["calibration"] == 2 * x.size * sum(x.shape)
        assert counter.by_layer(path)["forward"] == 2 * plain.by_layer(path)["forward"]
    assert counter.by_kind()["projection"] == 0


# ---- modes and layers --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("modes", "conv", "tokens", "flat"),
    [
        (MODES, "1111", "111", "11"),
        (("batch",), "1000", "100", "10"),
        (("channel",), "0100", "001", "01"),
        (("feature",), "0100", "001", "01"),
        (("channel", "height", "width"), "0111", "011", "01"),
        (("batch", "token"), "1000", "110", "10"),
        (("batch", "height"), "1010", "100", "10"),
    ],
)
def test_modes_choose_what_gets_a_factor(modes: tuple[str, ...], conv: str, tokens: str, flat: str) -> None:
    """A mode that is not selected has no factor, no spectrum and no cost, and its full size in the core."""
    x = np.random.default_rng(0).standard_normal((4, 6, 3))
    spaces = [
        calibrate(ThreeLayers(), batches(), modes=modes)["conv2"],
        calibrate(Tokens(), [x], modes=modes)["fc"],
        calibrate(Tokens(), [x[:, 0]], modes=modes)["fc"],
    ]
    for space, pattern in zip(spaces, (conv, tokens, flat), strict=True):
        chosen = tuple(c == "1" for c in pattern)
        assert tuple(U is not None for U in space.factors) == chosen
        assert tuple(s is not None for s in space.spectra) == chosen
        assert tuple(e is not None for e in space.energy_kept) == chosen
        for n, r, core, yes in zip(space.shape, space.ranks, space.core_shape, chosen, strict=True):
            assert (r is not None) == yes
            assert core == (r if yes else n)
    with count_macs() as counter:
        calibrate(Tokens(), [x], modes=modes)
    assert counter.by_kind()["calibration"] == x.size * sum(n for n, c in zip(x.shape, tokens, strict=True) if c == "1")


def test_token_is_height_and_width_together() -> None:
    """Linear layers follow the convolutions' names, but neither name alone means the tokens."""
    x = np.random.default_rng(0).standard_normal((4, 6, 3))
    assert calibrate(Tokens(), [x], modes=("height", "width"))["fc"].ranks[1] is not None
    with pytest.raises(ValueError, match=r"layer 'fc'.*\('width',\).*\('batch', 'token', 'feature'\).*\(4, 6, 3\)"):
        calibrate(Tokens(), [x], modes=("width",))


def test_default_layers_follow_what_trains() -> None:
    """All trainable layers, in module order; after tune() those it selected, without the head."""
    net, data = ThreeLayers(), batches()
    assert list(calibrate(net, data)) == ["conv1", "conv2", "head"]
    net.conv1.requires_grad_(False)
    assert list(calibrate(net, data)) == ["conv2", "head"]
    tune(net, "last:1")
    assert list(calibrate(net, data)) == ["conv2"]
    tune(net, "head")
    with pytest.raises(ValueError, match="no convolution or linear layer that trains"):
        calibrate(net, data)


def test_layers_by_path_and_glob_in_module_order() -> None:
    """Patterns in any order, overlapping, a single one without a list; frozen layers may be asked for."""
    net, data = ThreeLayers(), batches()
    net.requires_grad_(False)
    assert list(calibrate(net, data, layers=["head", "conv*", "conv1"])) == ["conv1", "conv2", "head"]
    assert list(calibrate(net, data, layers="conv2")) == ["conv2"]
    for layers, message in ((["conv9"], "'conv9' matches no"), (["conv1", "drop"], "'drop' matches no"), ([], "empty")):
        with pytest.raises(ValueError, match=message):
            calibrate(net, data, layers=layers)


# ---- streaming -----------------------------------------------------------------------------


def test_no_two_batches_of_activations_are_alive() -> None:
    """When the next batch is asked for, nothing of the last one is left: not the batch, not an activation."""
    net = ThreeLayers()
    alive: list[weakref.ref[Any]] = []
    watched = 0

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert not inputs[0].requires_grad  # no tape behind it
        alive.append(weakref.ref(inputs[0].data))

    for layer in (net.conv1, net.conv2, net.head):
        layer.register_forward_pre_hook(watch)

    def stream() -> Iterator[tuple[np.ndarray, int]]:
        nonlocal watched
        for _ in range(3):
            gc.collect()
            assert [ref() for ref in alive if ref() is not None] == []
            yield np.random.default_rng(watched).standard_normal((5, 2, 7, 5)), 1
            watched += 1

    calibration = calibrate(net, stream())
    assert (watched, len(alive)) == (3, 9)
    assert calibration["conv1"].batches == 3


def test_a_hoarding_hook_would_be_caught() -> None:
    """The test above can fail: with one reference kept, the stream sees a batch alive."""
    net = ThreeLayers()
    hoard, refs = [], []
    net.conv2.register_forward_pre_hook(lambda module, inputs: hoard.append(inputs[0].data))
    net.conv2.register_forward_pre_hook(lambda module, inputs: refs.append(weakref.ref(inputs[0].data)))
    calibrate(net, batches(2))
    gc.collect()
    assert all(ref() is not None for ref in refs)


def test_the_net_is_left_as_it_was_found() -> None:
    """Training flags, hooks and stores come back, also after an error; no gradient and no tape appear."""
    net, data = ThreeLayers(), batches()
    net.train()
    net.conv2.eval()
    flags = [module.training for module in net.modules()]
    assert len(set(flags)) == 2
    compress(net, calibrate(net, [x[:4] for x in data], layers="conv2"))
    store = net.conv2.store
    first = calibrate(net, data)  # another batch size than the compressed layer's
    with pytest.raises(ValueError, match="NaN"):
        calibrate(net, [data[0], data[1] * np.nan])
    assert [module.training for module in net.modules()] == flags
    assert all(not module._pre_hooks for module in net.modules())
    assert net.conv2.store is store
    assert net.conv1.store is EXACT
    assert all(parameter.grad is None for parameter in net.parameters())
    assert_same(calibrate(net, data), first, rtol=0, atol=0)  # dropout was off


def test_batches_of_any_kind() -> None:
    """Arrays, Tensors, (x, y) tuples and [x, y] lists, from a list or a generator, give the same Grams."""
    net, data = ThreeLayers(), batches()
    expected = calibrate(net, data)
    labels = np.zeros(5, int)
    for variant in ([Tensor(x) for x in data], [(x, labels) for x in data], [[x, labels] for x in data], iter(data)):
        assert_same(calibrate(net, variant), expected, rtol=0, atol=0)


def test_without_the_batch_mode_batches_may_differ_in_size() -> None:
    """The last, smaller batch of a data set counts with its images."""
    net, data = ThreeLayers(), batches()
    space = calibrate(net, [*data[:2], data[2][:2]], modes=("channel", "height", "width"))["conv1"]
    assert (space.shape, space.samples, space.batches) == ((5, 2, 7, 5), 12, 3)


# ---- other subspaces from the same Grams -----------------------------------------------------


def test_with_epsilon_needs_no_data_and_equals_another_run() -> None:
    """Re-truncation = calibration at that threshold, bit by bit; the original does not change."""
    net, data = ThreeLayers(), batches()
    low = calibrate(net, data, epsilon=0.3)
    assert_same(low.with_epsilon(0.95), calibrate(net, data, epsilon=0.95), rtol=0, atol=0)
    mixed = low.with_epsilon({"conv2": 1})
    assert mixed["conv2"].ranks == (5, 4, 4, 3)
    assert mixed["conv1"].ranks == low["conv1"].ranks
    assert (mixed["conv2"].epsilon, mixed["conv1"].epsilon, low["conv2"].epsilon) == (1.0, 0.3, 0.3)
    for bad, error in ((0, ValueError), (1.1, ValueError), ({"nope": 0.5}, ValueError), ({"conv1": "x"}, TypeError)):
        with pytest.raises(error, match=r"epsilon"):
            low.with_epsilon(bad)


def test_with_ranks_takes_exactly_these_directions() -> None:
    """The leading ones; None leaves a mode alone; with_epsilon takes the ranks back."""
    calibration = calibrate(ThreeLayers(), batches(), epsilon=1)
    given_ranks = calibration.with_ranks({"conv2": (2, None, 4, 1)})
    space, full = given_ranks["conv2"], calibration["conv2"]
    assert space.ranks == (2, None, 4, 1)
    assert space.epsilon is None
    assert space.factors[0] is not None
    assert full.factors[0] is not None
    assert_array_equal(space.factors[0], full.factors[0][:, :2])
    assert given_ranks["conv1"].ranks == calibration["conv1"].ranks
    assert given_ranks.with_epsilon(1)["conv2"].ranks == full.ranks


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ({"conv2": (6, 4, 4, 3)}, r"'conv2'.*mode 0 is 6, expected an integer from 1 to 5"),
        ({"conv2": (5, 0, 4, 3)}, "mode 1 is 0"),
        ({"conv2": (5, 4, 4)}, r"expected one per mode of shape \(5, 4, 4, 3\)"),
        ({"conv2": (5, 4, 1.5, 3)}, r"mode 2 is 1\.5"),
        ({"conv3": (1, 1, 1, 1)}, "ranks names layer 'conv3', expected one of 'conv1', 'conv2', 'head'"),
    ],
)
def test_ranks_that_do_not_fit_are_refused(ranks: Any, message: str) -> None:
    """Over the mode, zero, wrong length, unknown layer: named with the shape."""
    with pytest.raises(ValueError, match=message):
        calibrate(ThreeLayers(), batches()).with_ranks(ranks)


def test_a_rank_for_a_mode_without_gram_is_refused() -> None:
    """Directions that were never measured cannot be taken."""
    calibration = calibrate(ThreeLayers(), batches(), modes=("channel",))
    assert calibration.with_ranks({"conv1": (None, 1, None, None)})["conv1"].ranks == (None, 1, None, None)
    with pytest.raises(ValueError, match=r"'conv1'.*mode 'height' was not calibrated"):
        calibration.with_ranks({"conv1": (None, 1, 2, None)})


def test_two_merged_halves_equal_one_run() -> None:
    """Calibration spread over machines: same Grams to rounding, same ranks, samples added; neither half changes."""
    net, data = ThreeLayers(), batches(5)
    one, two = calibrate(net, data[:2]), calibrate(net, data[2:], epsilon=0.2)
    before = one["conv2"].spectra[0]
    merged = one.merge(two)
    assert_same(merged, calibrate(net, data), rtol=1e-10, atol=1e-9)
    assert merged["conv2"].epsilon == 0.7
    assert one["conv2"].spectra[0] is before
    assert_same(two.with_epsilon(0.7).merge(one), merged, rtol=1e-10, atol=1e-9)
    for path in merged:
        for mode in range(len(merged[path].shape)):
            total, half = merged[path].spectra[mode], one[path].spectra[mode]
            assert total is not None
            assert half is not None
            assert total.sum() > 1.5 * half.sum()  # a merge that returned one half would pass nothing here


def test_merging_what_does_not_fit_is_refused() -> None:
    """Other layers, batch sizes, image sizes or modes: named with both shapes."""
    net, data = ThreeLayers(), batches()
    calibration = calibrate(net, data)
    with pytest.raises(ValueError, match=r"only here \['conv1', 'head'\], only in the other \[\]"):
        calibration.merge(calibrate(net, data, layers="conv2"))
    with pytest.raises(ValueError, match=r"'conv1'.*\(3, 2, 7, 5\), expected \(5, 2, 7, 5\).*batch"):
        calibration.merge(calibrate(net, [x[:3] for x in data]))
    with pytest.raises(ValueError, match=r"'conv1'.*\(5, 2, 6, 5\), expected \(5, 2, 7, 5\)"):
        calibration.merge(calibrate(net, [x[:, :, :6] for x in data]))
    with pytest.raises(ValueError, match=r"'conv1'.*modes are \('channel',\)"):
        calibration.merge(calibrate(net, data, modes=("channel",)))
    free = ("channel", "height", "width")
    merged = calibrate(net, data, modes=free).merge(calibrate(net, [x[:3] for x in data], modes=free))
    assert merged["conv1"].samples == 24


def test_a_calibration_of_another_net_is_refused_by_check() -> None:
    """Missing layer, other channels, other kind of layer: named with both shapes; batch and image size are free."""
    calibration = calibrate(ThreeLayers(), batches())
    calibration.check(ThreeLayers(np.float32))
    other = ThreeLayers()
    other.conv2 = nn.Conv2d(8, 8, 1, groups=4)
    with pytest.raises(ValueError, match=r"'conv2'.*\(5, 4, 4, 3\).*\(8, 2, 1, 1\) takes \(B, 8, H, W\)"):
        calibration.check(other)
    other.conv2 = nn.Linear(4, 6)
    with pytest.raises(ValueError, match=r"'conv2'.*\(5, 4, 4, 3\).*Linear.*\(6, 4\) takes \(B, 4\)"):
        calibration.check(other)
    del other.conv2
    with pytest.raises(ValueError, match=r"no convolution or linear layer 'conv2'.*\(5, 4, 4, 3\).*'conv1', 'head'"):
        calibration.check(other)


# ---- what it looks like ------------------------------------------------------------------------


def test_the_table_adds_up() -> None:
    """One line per layer with its shape, ranks, energies and compression; the total is the sum of the rows."""
    calibration = calibrate(ThreeLayers(), batches()).with_ranks({"conv2": (1, 2, None, 3), "head": (5, 6)})
    lines = str(calibration).splitlines()
    conv2 = next(line for line in lines if line.startswith("conv2"))
    assert "5x4x4x3" in conv2
    assert "1x2x-x3" in conv2
    assert conv2.endswith("10.0x")  # 240 elements to 1·2·4·3
    assert f"{calibration['conv2'].energy_kept[0]:.3f}" in conv2
    cores = sum(int(np.prod(space.core_shape)) for space in calibration.values())
    total = next(line for line in lines if line.startswith("total")).split()
    assert total[1:3] == [str(350 + 240 + 30), str(cores)]
    assert lines[-1] == "15 samples in 3 batches; epsilon 0.7; ranks given for 2 layer(s)"
    assert repr(calibration) == "Calibration(3 layers, 15 samples in 3 batches)"


def test_it_is_a_mapping() -> None:
    """Layer paths in, subspaces out, each computed once."""
    calibration = calibrate(ThreeLayers(), batches())
    assert (len(calibration), list(calibration)) == (3, ["conv1", "conv2", "head"])
    assert "conv2" in calibration
    assert "conv3" not in calibration
    assert calibration["conv2"] is calibration["conv2"]
    assert isinstance(calibration["conv2"], Subspace)
    with pytest.raises(KeyError, match=r"no layer 'conv3'.*'conv1', 'conv2', 'head'"):
        calibration["conv3"]


def test_progress_is_shown_on_request_only(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Silent into a file, a bar on request, a bar by default on a terminal; never on stdout."""
    net, data = ThreeLayers(), batches()
    calibrate(net, data)
    assert capsys.readouterr().err == ""
    calibrate(net, iter(data), progress=True)
    shown = capsys.readouterr()
    assert "calibrating" in shown.err
    assert "3/3" in shown.err
    assert shown.out == ""
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    calibrate(net, data)
    assert "3/3" in terminal.getvalue()
    terminal.seek(0)
    terminal.truncate()
    calibrate(net, data, progress=False)
    assert terminal.getvalue() == ""


# ---- bad input -----------------------------------------------------------------------------------

X = np.random.default_rng(0).standard_normal((5, 2, 7, 5))


class SkipsConv2(ThreeLayers):
    """A net whose second layer is never reached."""

    def forward(self, x: Tensor) -> Tensor:
        return self.conv1(x)


class TwoSizes(nn.Module):
    """One layer, called with two shapes in one forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 3, rng=np.random.default_rng(0)).to(np.float64)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.fc(x)[:2])


class FlattensTooMuch(TwoSizes):
    """A linear layer on one vector."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x[0])


@pytest.mark.parametrize(
    ("net", "data", "options", "error", "message"),
    [
        (ThreeLayers, [X], {"epsilon": 0}, ValueError, r"epsilon is 0, expected a number in \(0, 1\]"),
        (ThreeLayers, [X], {"epsilon": 1.01}, ValueError, "epsilon is 1.01"),
        (ThreeLayers, [X], {"epsilon": None}, TypeError, "epsilon is None"),
        (ThreeLayers, [X], {"modes": ()}, ValueError, r"modes are \(\), expected one or more of"),
        (ThreeLayers, [X], {"modes": ("batch", "time")}, ValueError, "modes are .*'time'.*expected"),
        (ThreeLayers, [X], {"modes": "batch"}, TypeError, "modes is the text 'batch'"),
        (ThreeLayers, [], {}, ValueError, "batches is empty"),
        (ThreeLayers, X, {}, TypeError, r"single array of shape \(5, 2, 7, 5\)"),
        (ThreeLayers, [X, "no"], {}, TypeError, "batch 1 is a str"),
        (ThreeLayers, [(1, X)], {}, TypeError, "batch 0 is a tuple with inputs of type int"),
        (ThreeLayers, [()], {}, TypeError, "batch 0 is a tuple"),
        (ThreeLayers, [X, X[:4]], {}, ValueError, r"'conv1'.*\(4, 2, 7, 5\), expected \(5, 2, 7, 5\).*batch size"),
        (ThreeLayers, [X, X[:, :, :5]], {}, ValueError, r"'conv1'.*\(5, 2, 5, 5\), expected \(5, 2, 7, 5\)"),
        (
            ThreeLayers,
            [X, X[:, :, :5]],
            {"modes": ("channel",)},
            ValueError,
            r"'conv1'.*\(5, 2, 5, 5\), expected \(5, 2, 7, 5\), that of the first batch",
        ),
        (ThreeLayers, [X.astype(int)], {}, TypeError, "layer 'conv1': activation is int64"),
        (ThreeLayers, [X, X * np.nan], {}, ValueError, r"layer 'conv1'.*\(5, 2, 7, 5\) contains NaN or infinity"),
        (ThreeLayers, [np.where(X > 2, -np.inf, X)], {"layers": "conv1"}, ValueError, "layer 'conv1'.*NaN or infinity"),
        (ThreeLayers, [X * 0], {"layers": "conv1"}, ValueError, r"layer 'conv1'.*\(5, 2, 7, 5\) were zero"),
        (ThreeLayers, [X[:0]], {"layers": "conv1"}, ValueError, r"layer 'conv1'.*\(0, 2, 7, 5\), which is empty"),
        (SkipsConv2, [X], {}, ValueError, r"\['conv2', 'head'\] were not reached"),
        (TwoSizes, [X[:, 0, 0, :3]], {}, ValueError, r"layer 'fc'.*\(2, 3\), expected \(5, 3\)"),
        (FlattensTooMuch, [X[:, 0, 0, :3]], {}, ValueError, r"layer 'fc'.*\(3,\), expected \(B, I\) or \(B, L, I\)"),
        (dict, [X], {}, TypeError, "net is a dict"),
    ],
)
def test_bad_input_is_named(net: Any, data: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    """Every refusal names the argument or layer, what came and what was expected, with both shapes."""
    with pytest.raises(error, match=message):
        calibrate(net(), data, **options)
