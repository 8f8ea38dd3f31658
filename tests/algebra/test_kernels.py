"""Compiled kernels equal their NumPy twins, count the same, and leave no memory behind."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from strategies import arrays, conv_geometries

from lance_ref import Subspace, count_macs
from lance_ref.algebra import projection_fast as projection
from lance_ref.algebra.geometry import ConvGeometry
from lance_ref.algebra.kernels import columns as kernels_columns
from lance_ref.algebra.kernels import depthwise as kernels_depthwise
from lance_ref.algebra.kernels import elementwise
from lance_ref.algebra.kernels import threads as kernels
from lance_ref.stores import Lance

needs_numba = pytest.mark.skipif(not kernels.numba_enabled(), reason="Numba is switched off or not installed")


def both(call: Any) -> tuple[Any, Any]:
    """The compiled result and the twin's."""
    compiled = call()
    with pytest.MonkeyPatch.context() as patch:
        for module in (kernels, kernels_columns, kernels_depthwise, elementwise):
            patch.setattr(module, "numba_enabled", lambda: False)
        return compiled, call()


@needs_numba
@pytest.mark.parametrize("along_channels", [True, False])
@given(g=conv_geometries(depthwise=True), seed=st.integers(0, 99), double=st.booleans())
def test_depthwise_kernels_equal_their_twins(along_channels: bool, g: ConvGeometry, seed: int, double: bool) -> None:
    """Forward and both gradients, either kind of loops, any stride, padding, dilation and channel multiplier."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels_depthwise, "FEW", 1 if along_channels else 1000)
        check_depthwise(g, seed, double)


def check_depthwise(g: ConvGeometry, seed: int, double: bool) -> None:
    dtype, tolerance = (np.float64, 1e-12) if double else (np.float32, 1e-5)
    x, weight, grad_output = arrays(g, seed, dtype)
    for call in (
        lambda: g.forward(x, weight),
        lambda: g.input_gradient(weight, grad_output),
        lambda: g.weight_gradient(x, grad_output),
    ):
        compiled, twin = both(call)
        assert compiled.dtype == twin.dtype == dtype
        np.testing.assert_allclose(compiled, twin, rtol=tolerance, atol=10 * tolerance)


@needs_numba
@given(shape=st.tuples(*[st.integers(1, 4)] * 6), dtype=st.sampled_from(["float32", "float64"]))
def test_the_layout_of_projected_gradients_equals_its_twin(shape: tuple[int, ...], dtype: str) -> None:
    """(r1, o, k_h, r3, k_w, r4) -> (o, k_h, k_w, r1, r3, r4), each number at its place."""
    Z = np.arange(np.prod(shape), dtype=dtype).reshape(shape)
    compiled, twin = both(lambda: kernels.offsets_first(Z))
    np.testing.assert_array_equal(compiled, twin)
    np.testing.assert_array_equal(compiled, np.einsum("aopiqj->opqaij", Z))


@needs_numba
@settings(max_examples=10)
@given(parts=st.integers(1, 5))
def test_threads_share_the_planes_without_gap_or_overlap(parts: int) -> None:
    """However many threads, every plane is done once."""
    g = ConvGeometry((3, 7, 6, 5), (7, 1, 3, 3), padding=((1, 1), (1, 1)), groups=7)
    x, weight, _ = arrays(g, 0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_threads", lambda: parts)
        patch.setattr(kernels, "SERIAL_ELEMENTS", 0)
        shared = g.forward(x, weight)
    np.testing.assert_array_equal(shared, g.forward(x, weight))


def test_a_planted_fault_in_a_twin_is_caught() -> None:
    """The comparison itself can fail: a twin that forgets the padding differs."""
    g = ConvGeometry((1, 2, 5, 5), (2, 1, 3, 3), padding=((1, 0), (1, 0)), groups=2)
    x, weight, _ = arrays(g, 0)
    right = kernels_depthwise.depthwise_forward_numpy(x, weight, g.output_size, g.stride, g.padding, g.dilation)
    shifted = ((0, 1), (0, 1))
    wrong = kernels_depthwise.depthwise_forward_numpy(x, weight, g.output_size, g.stride, shifted, g.dilation)
    np.testing.assert_allclose(g.forward(x, weight), right)
    assert not np.allclose(right, wrong)


def test_everything_runs_without_numba() -> None:
    """LANCE_REF_NUMBA=0 takes the twins, and never imports Numba."""
    code = (
        "import sys, numpy as np, lance_ref as lr\n"
        "net = lr.models.create('convnet', num_classes=10, in_channels=1)\n"
        "x = np.random.default_rng(0).standard_normal((4, 1, 8, 8)).astype(np.float32)\n"
        "lr.F.cross_entropy(net(x), np.zeros(4, np.int64)).backward()\n"
        "conv = lr.nn.Conv2d(3, 3, 3, groups=3)\n"
        "conv(np.ones((1, 3, 5, 5), np.float32)).sum().backward()\n"
        "assert 'numba' not in sys.modules\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"LANCE_REF_NUMBA": "0", "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("value", ["yes", "2", ""])
def test_a_wrong_setting_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """LANCE_REF_NUMBA takes 0 or 1 and says so."""
    monkeypatch.setenv("LANCE_REF_NUMBA", value)
    with pytest.raises(ValueError, match=r"LANCE_REF_NUMBA.*0 or 1"):
        kernels.numba_enabled.__wrapped__()


@given(n=st.integers(0, 40), ceiling=st.sampled_from([np.inf, 6.0, 0.5]), double=st.booleans())
def test_clamp_and_pack_element_by_element(n: int, ceiling: float, double: bool) -> None:
    """Values and bits, with sizes that do not fill the last byte, at the borders, and for NaN and infinity."""
    x = np.random.default_rng(n).standard_normal(n).astype(np.float64 if double else np.float32) * 5
    special = [0.0, -0.0, ceiling, np.nan, np.inf, -np.inf][:n]
    x[: len(special)] = special
    out, mask = elementwise.clamp_and_pack(x, ceiling)
    bits = np.unpackbits(mask, count=n)
    assert mask.size == (n + 7) // 8
    assert out.dtype == x.dtype
    for value, clamped, bit in zip(x, out, bits, strict=True):
        expected = value if np.isnan(value) else min(max(value, 0), ceiling)
        np.testing.assert_equal(clamped, expected)
        assert bit == (value > 0 and (value < ceiling or ceiling == np.inf))


@needs_numba
@given(n=st.integers(0, 40), double=st.booleans())
def test_apply_mask_equals_its_twin(n: int, double: bool) -> None:
    """Any size, zeros where the bit is not set even for NaN and infinity."""
    rng = np.random.default_rng(n)
    x = rng.standard_normal(n).astype(np.float64 if double else np.float32)
    x[:2] = [np.nan, np.inf][:n]
    mask = np.packbits(rng.random(n) < 0.5)
    masked, twin = both(lambda: elementwise.apply_mask(mask, x, 1.25))
    np.testing.assert_array_equal(masked, twin)
    assert masked.dtype == x.dtype


@needs_numba
@given(
    size=st.tuples(st.integers(1, 8), st.integers(1, 8)),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    data=st.data(),
    seed=st.integers(0, 99),
)
def test_max_pool_kernels_equal_their_twins(size: Any, kernel: Any, stride: Any, data: Any, seed: int) -> None:
    """Maximum, its place (the first of equals, NaN above all) and the scattered gradient."""
    padding = tuple(data.draw(st.integers(0, k // 2)) for k in kernel)
    assume(all(n + 2 * p >= k for n, p, k in zip(size, padding, kernel, strict=True)))
    rng = np.random.default_rng(seed)
    x = rng.integers(-2, 3, (2, 3, *size)).astype(np.float64)  # many ties
    x[rng.random(x.shape) < 0.05] = np.nan
    (out, argmax), (twin_out, twin_argmax) = both(lambda: elementwise.max_pool_forward(x, kernel, stride, padding))
    np.testing.assert_array_equal(out, twin_out)
    np.testing.assert_array_equal(argmax, twin_argmax)
    assert argmax.dtype == twin_argmax.dtype == np.uint8
    grad_output = rng.standard_normal(out.shape)
    grad, twin = both(lambda: elementwise.max_pool_backward(argmax, grad_output, x.shape, kernel, stride, padding))
    np.testing.assert_allclose(grad, twin, rtol=1e-12, atol=1e-12)
    assert grad.sum() == pytest.approx(grad_output.sum(), abs=1e-9)


@needs_numba
@given(
    data=st.data(),
    g=conv_geometries(depthwise=True),
    seed=st.integers(0, 99),
    double=st.booleans(),
    lanes=st.sampled_from([1, 2, 64]),
)
def test_a_depthwise_core_in_one_pass_equals_the_products(
    data: Any, g: ConvGeometry, seed: int, double: bool, lanes: int
) -> None:
    """Height and width of any rank, batch and channels put back or never compressed: gradient and multiply-adds."""
    dtype = np.float64 if double else np.float32
    x, _, grad_output = arrays(g, seed, dtype)
    compressed = data.draw(st.booleans())  # whether batch and channels have factors, to be put back
    ranks = [data.draw(st.integers(1, n)) if mode > 1 or compressed else None for mode, n in enumerate(g.input_shape)]
    store = Lance(Subspace.random(g.input_shape, ranks, np.random.default_rng(seed)), dtype=dtype)
    core, expanded = store.save(x)["core"], (0, 1) if compressed else ()
    found, macs = {}, {}
    for enabled in (True, False):
        with pytest.MonkeyPatch.context() as patch, count_macs() as counter:
            patch.setattr(projection.kernels, "numba_enabled", lambda enabled=enabled: enabled)
            patch.setattr(kernels_depthwise, "LANES", lanes)
            found[enabled] = projection.separable_order(core, store.factors, grad_output, g, expanded)
        macs[enabled] = sum(counter.macs.values())
    assert macs[True] == macs[False]
    assert found[True].dtype == dtype
    scale = max(1.0, float(np.abs(found[False]).max()))
    np.testing.assert_allclose(found[True], found[False], rtol=0, atol=(1e-12 if double else 3e-5) * scale)


def test_which_cores_go_to_the_loops() -> None:
    """Depthwise, maps of up to 256 places, batch and channels at full size."""
    small, large = (ConvGeometry((2, 4, n, n), (4, 1, 1, 1), groups=4) for n in (16, 17))
    U = np.eye(2)
    assert projection.depthwise_alone((None, None, U, U), small)
    assert not projection.depthwise_alone((None, None, U, U), large)
    assert not projection.depthwise_alone((U, None, U, U), small)
    assert not projection.depthwise_alone((None, U, U, U), small)
    assert not projection.depthwise_alone((None, None, U, U), ConvGeometry((2, 4, 5, 5), (4, 4, 1, 1)))


@needs_numba
@given(shape=st.lists(st.integers(1, 6), min_size=2, max_size=4), double=st.booleans(), swapped=st.booleans())
def test_scale_and_shift_equals_its_twin(shape: list[int], double: bool, swapped: bool) -> None:
    """Planes long and short, two to four dimensions, laid out in any order; NaN stays where it was."""
    rng = np.random.default_rng(len(shape))
    x = rng.standard_normal(shape).astype(np.float64 if double else np.float32)
    if swapped:
        x = x.swapaxes(0, -1)
    x.flat[0] = np.nan
    scale, shift = rng.standard_normal((2, x.shape[1])).astype(x.dtype)
    compiled, twin = both(lambda: elementwise.scale_and_shift(x, scale, shift))
    assert compiled.dtype == twin.dtype == x.dtype
    np.testing.assert_allclose(compiled, twin, rtol=1e-5, atol=1e-6)


@needs_numba
@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize("g", [
    ConvGeometry((3, 11, 6, 5), (11, 1, 3, 2), (2, 1), ((1, 0), (0, 2)), (1, 2), groups=11),
    ConvGeometry((2, 5, 6, 5), (10, 1, 2, 3), (1, 2), ((1, 1), (2, 0)), groups=5),
    ConvGeometry((2, 9, 3, 31), (9, 1, 3, 3), groups=9),
], ids=["along the channels", "multiplier 2", "wide map"])  # fmt: skip
def test_threads_share_the_depthwise_loops(parts: int, g: ConvGeometry) -> None:
    """Every thread reads and writes its own channels: the same bits as one thread, and the twin's numbers."""
    x, weight, grad_output = arrays(g, 0)
    ranks = (None, None, 2, 3)
    store = Lance(Subspace.random(g.input_shape, ranks, np.random.default_rng(0)), dtype=np.float64)
    core = store.save(x)["core"]
    for call in (
        lambda: g.forward(x, weight),
        lambda: g.input_gradient(weight, grad_output),
        lambda: g.weight_gradient(x, grad_output),
        lambda: projection.separable_order(core, store.factors, grad_output, g),
    ):
        alone, twin = both(call)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "_threads", lambda: parts)
            patch.setattr(kernels, "SERIAL_ELEMENTS", 0)
            patch.setattr(kernels_depthwise, "LANES", 2)
            shared = call()
        np.testing.assert_array_equal(shared, alone)
        np.testing.assert_allclose(shared, twin, rtol=1e-12, atol=1e-12)


@needs_numba
@pytest.mark.parametrize(("work", "planes", "calls"), [
    (kernels.SERIAL_ELEMENTS, 9, [(0, 9)]),
    (kernels.SERIAL_ELEMENTS + 1, 9, [(0, 2), (2, 4), (4, 6), (6, 9)]),
    (kernels.SERIAL_ELEMENTS + 1, 3, [(0, 1), (1, 2), (2, 3)]),
])  # fmt: skip
def test_only_large_work_is_shared_out(work: int, planes: int, calls: list[Any], monkeypatch: Any) -> None:
    """Small work stays in the calling thread; no thread is woken without a plane."""
    monkeypatch.setattr(kernels, "_threads", lambda: 4)
    seen: list[tuple[int, int]] = []
    loops = kernels.Loops(lambda start, stop: None)
    loops.compiled = lambda start, stop: seen.append((start, stop))
    loops.run(planes, work)
    assert sorted(seen) == calls


def test_an_error_in_a_thread_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    """And what a thread does is done when ``run`` returns."""
    monkeypatch.setattr(kernels, "_threads", lambda: 2)
    done = []

    def late(start: int, stop: int) -> None:
        if start:
            time.sleep(0.2)
            done.append(start)
            raise ZeroDivisionError

    loops = kernels.Loops(late)
    loops.compiled = late
    with pytest.raises(ZeroDivisionError):
        loops.run(2, 1 << 20)
    assert done == [1]


def test_the_switch_is_obeyed(monkeypatch: pytest.MonkeyPatch) -> None:
    """1 takes the compiled loops where Numba is installed, 0 the twins, everywhere."""
    found = importlib.util.find_spec("numba") is not None
    for setting, expected in (("1", found), ("0", False)):
        monkeypatch.setenv("LANCE_REF_NUMBA", setting)
        assert kernels.numba_enabled.__wrapped__() is expected
    monkeypatch.setattr(kernels.Loops, "run", lambda *arguments: pytest.fail("a compiled loop"))
    for module in (kernels, kernels_columns, kernels_depthwise, elementwise):
        monkeypatch.setattr(module, "numba_enabled", lambda: False)
    for g in (ConvGeometry((2, 9, 6, 5), (9, 1, 3, 2), groups=9), ConvGeometry((2, 3, 6, 5), (4, 3, 3, 2))):
        x, weight, grad_output = arrays(g, 0)
        store = Lance(Subspace.random(g.input_shape, (None, None, 2, 2), np.random.default_rng(0)), dtype=np.float64)
        g.forward(x, weight), g.input_gradient(weight, grad_output), g.weight_gradient(x, grad_output)
        store.weight_gradient(store.save(x), grad_output, g)
    kernels.offsets_first(np.ones((2,) * 6))
    elementwise.apply_mask(np.packbits(np.ones(8, bool)), np.ones(8))
    elementwise.scale_and_shift(np.ones((2, 3, 4, 4)), np.ones(3), np.ones(3))
    _, argmax = elementwise.max_pool_forward(np.ones((1, 1, 4, 4)), (2, 2), (2, 2), (0, 0))
    elementwise.max_pool_backward(argmax, np.ones((1, 1, 2, 2)), (1, 1, 4, 4), (2, 2), (2, 2), (0, 0))


@pytest.mark.parametrize("value", ["0", "-1", "1.5", "two"])
def test_a_wrong_number_of_threads_is_refused(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """LANCE_REF_THREADS takes a positive integer and says so; unset, it is the processors of this process."""
    monkeypatch.setenv("LANCE_REF_THREADS", value)
    with pytest.raises(ValueError, match=r"LANCE_REF_THREADS.*positive integer"):
        kernels._threads.__wrapped__()
    for setting, expected in (("3", 3), ("1", 1), ("", len(os.sched_getaffinity(0)))):
        monkeypatch.setenv("LANCE_REF_THREADS", setting)
        assert kernels._threads.__wrapped__() == expected


def test_which_maps_run_along_the_channels() -> None:
    """Eight channels and more, of one output each, on maps of up to 28 columns."""
    assert kernels_depthwise.along_channels(8, 8, 28)
    assert not kernels_depthwise.along_channels(7, 7, 28)
    assert not kernels_depthwise.along_channels(8, 8, 29)
    assert not kernels_depthwise.along_channels(8, 16, 5)


@pytest.mark.parametrize("together", [8, 16, 48])
def test_blocks_of_masks_change_nothing(together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bits that are packed some at a time are those packed at once, and so are the clamped values."""
    x = np.random.default_rng(0).standard_normal(53) * 5
    whole = elementwise.clamp_and_pack(x, 6.0)
    monkeypatch.setattr(elementwise, "PACKED_TOGETHER", together)
    for block, expected in zip(elementwise.clamp_and_pack(x, 6.0), whole, strict=True):
        np.testing.assert_array_equal(block, expected)
    np.testing.assert_array_equal(elementwise.pack_blocks(lambda x: x < 1, x), np.packbits(x < 1))


@needs_numba
def test_windows_of_minus_infinity() -> None:
    """Where nothing is above the padding, the first place inside the image is taken, and gets the gradient."""
    x = np.full((1, 2, 3, 4), -np.inf)
    pooled = both(lambda: elementwise.max_pool_forward(x, (3, 3), (2, 2), (1, 1)))
    for out, argmax in pooled:
        np.testing.assert_array_equal(out, np.full((1, 2, 2, 2), -np.inf))
        np.testing.assert_array_equal(argmax[0, 0], [[4, 3], [1, 0]])
        grad = elementwise.max_pool_backward(argmax, np.ones(out.shape), x.shape, (3, 3), (2, 2), (1, 1))
        assert grad.sum() == out.size
