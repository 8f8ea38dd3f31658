"""Quantised activations: half a step at most, ranges of any size, and the exact gradient of what was restored."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import arrays, conv_geometries, linear_geometries

from analysis.check.store_case import StoreTestCase
from analysis.steps.settings import TunedLayer
from lance_ref import F, count_macs
from lance_ref.algebra.frame import feature_mode
from lance_ref.algebra.geometry import ConvGeometry, LinearGeometry
from lance_ref.nn.module import Parameter
from lance_ref.stores import Quantized, quantized
from lance_ref.stores.quantized import dequantise, quantise

layers = st.one_of(conv_geometries(), linear_geometries())
bits_of = st.sampled_from([8, 4])
dtypes = st.sampled_from([np.float32, np.float64])


def of_a_vector() -> None:
    """Each of its entries would need a range."""
    F.linear(np.ones(3, np.float32), Parameter(np.ones((2, 3), np.float32)), store=Quantized())


class TestEightBits(StoreTestCase):
    """One byte an entry."""

    method, bits = "int8", 8
    wrong: ClassVar = {f"bits is {bits!r}": lambda bits=bits: Quantized(bits) for bits in (16, 0, True, "8")} | {
        "(3,), expected a batch": of_a_vector
    }

    def make(self, layer: TunedLayer) -> Quantized:
        return Quantized(self.bits)


class TestFourBits(TestEightBits):
    """Half a byte; of an odd number of entries the last byte is half empty."""

    method, bits = "int4", 4


def restored(x: np.ndarray, bits: int) -> np.ndarray:
    mode = feature_mode(x.shape)
    return dequantise(quantise(x, mode, bits), x.shape, mode, bits)


def largest_error(x: np.ndarray, bits: int) -> np.ndarray:
    """Half a step of each entry's channel; 4 roundings of its largest value, and one of the least number there is."""
    others = tuple(axis for axis in range(x.ndim) if axis != feature_mode(x.shape))
    low, high = x.min(axis=others, keepdims=True), x.max(axis=others, keepdims=True)
    info = np.finfo(x.dtype)
    step = high.astype(np.longdouble) / (2**bits - 1) - low.astype(np.longdouble) / (2**bits - 1)
    rounding = 4 * float(info.eps) * np.maximum(np.abs(low), np.abs(high)).astype(np.longdouble)
    return step / 2 * (1 + 2**10 * float(info.eps)) + rounding + 2 * np.longdouble(info.smallest_subnormal)


@given(g=layers, seed=st.integers(0, 99), bits=bits_of, dtype=dtypes, data=st.data())
def test_every_entry_is_within_half_a_step(g: Any, seed: int, bits: int, dtype: Any, data: Any) -> None:
    """At any size of the numbers, from subnormal to nearly the largest, and far from zero; never NaN."""
    least, greatest = (-44, 37) if dtype == np.float32 else (-323, 307)
    exponent, offset = data.draw(st.integers(least, greatest)), data.draw(st.sampled_from([0.0, 1.0, -8.0, 1e4]))
    x = np.tanh(arrays(g, seed)[0]) + offset
    x = (x / np.abs(x).max() * 10.0**exponent).astype(dtype)
    result = restored(x, bits)
    assert result.dtype == dtype
    assert np.isfinite(result).all()
    assert (np.abs(result.astype(np.longdouble) - x) <= largest_error(x, bits)).all()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("bits", [8, 4])
def test_the_widest_range_and_the_narrowest(bits: int, dtype: Any) -> None:
    """From −max to max the range itself would overflow; of two neighbouring subnormals half of it vanishes."""
    info = np.finfo(dtype)
    for low, high in ((-info.max, info.max), (0, info.smallest_subnormal), (1, 1 + info.eps)):
        x = np.array([[low, 1], [high, 2], [high, 3]], dtype)
        result = restored(x, bits)
        assert (np.abs(result.astype(np.longdouble) - x) <= largest_error(x, bits)).all()


@given(g=layers, value=st.floats(-(2.0**99), 2.0**99, width=32), bits=bits_of, dtype=dtypes)
def test_a_constant_channel_comes_back_exactly(g: Any, value: float, bits: int, dtype: Any) -> None:
    """A range of 0 must not divide by 0; zero stays zero."""
    x = np.full(g.input_shape, value, dtype)
    np.testing.assert_array_equal(restored(x, bits), x)


@given(g=layers, seed=st.integers(0, 99), bits=bits_of)
def test_least_and_greatest_come_back_exactly(g: Any, seed: int, bits: int) -> None:
    """The ends of each range are codes 0 and 2ᵇ − 1, and the codes are the same at every call."""
    x = arrays(g, seed)[0]
    others = tuple(axis for axis in range(x.ndim) if axis != feature_mode(x.shape))
    result = restored(x, bits)
    np.testing.assert_array_equal(result.min(axis=others), x.min(axis=others))
    np.testing.assert_array_equal(result.max(axis=others), x.max(axis=others))
    first, second = Quantized(bits).save(x), Quantized(bits).save(x)
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_codes_by_hand() -> None:
    """Rounded to the nearest of 2ᵇ levels; 4-bit codes lie two to a byte, the first in the low half."""
    x = np.array([[0.0, -1.0], [1.0, 1.0], [0.4, 0.5]])
    saved = Quantized(8).save(x)
    np.testing.assert_array_equal(saved["codes"], [[0, 0], [255, 255], [102, 191]])  # 191.25
    np.testing.assert_array_equal(saved["minimum"], [0, -1])
    np.testing.assert_array_equal(saved["maximum"], [1, 1])
    assert saved["codes"].dtype == np.uint8
    packed = Quantized(4).save(x)["codes"]
    np.testing.assert_array_equal(packed, [0 + 16 * 0, 15 + 16 * 15, 6 + 16 * 11])  # 6.0, 11.25
    odd = Quantized(4).save(x[:, :1])["codes"]
    np.testing.assert_array_equal(odd, [0 + 16 * 15, 6])


@given(g=layers, seed=st.integers(0, 99), bits=bits_of, dtype=dtypes)
def test_the_gradient_is_the_exact_one_of_the_restored_activation(g: Any, seed: int, bits: int, dtype: Any) -> None:
    """Any layer: the only difference from backpropagation is that A became Â; as many multiply-adds."""
    x, _, grad_output = arrays(g, seed, dtype)
    store = Quantized(bits)
    saved = store.save(x)
    with count_macs() as counter:
        result = store.weight_gradient(saved, grad_output, g)
    with count_macs() as exact:
        expected = g.weight_gradient(restored(x, bits), grad_output)
    tolerance = 1e-12 if dtype == np.float64 else 2e-5
    np.testing.assert_allclose(result, expected, rtol=tolerance, atol=tolerance)
    assert result.dtype == dtype
    assert counter.macs == exact.macs


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("g", [ConvGeometry((7, 3, 3, 3), (2, 3, 2, 2)), LinearGeometry((7, 3), (2, 3))])
def test_images_are_restored_a_few_at_a_time(bits: int, g: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a workspace of one byte: one image at a time, two of 4 bits where each ends inside a byte."""
    x, _, grad_output = arrays(g, 0)
    whole = Quantized(bits).save(x)
    expected = Quantized(bits).weight_gradient(whole, grad_output, g)
    monkeypatch.setattr(quantized, "WORKSPACE_BYTES", 1)
    rows = []
    original = quantized.dequantise

    def watched(*arguments: Any) -> np.ndarray:
        result = original(*arguments)
        rows.append(len(result))
        return result

    monkeypatch.setattr(quantized, "dequantise", watched)
    saved = Quantized(bits).save(x)
    for name, array in whole.items():
        np.testing.assert_array_equal(saved[name], array)
    np.testing.assert_allclose(Quantized(bits).weight_gradient(saved, grad_output, g), expected, rtol=1e-12, atol=1e-12)
    assert rows == ([1] * 7 if bits == 8 else [2, 2, 2, 1])


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("bits", [8, 4])
def test_numbers_that_are_not_finite_are_named(bad: float, bits: int) -> None:
    """A NaN would become some code or other, silently."""
    x = np.ones((2, 3, 4, 5), np.float32)
    x[1, 2, 3, 4] = bad
    with pytest.raises(ValueError, match=r"\(2, 3, 4, 5\) contains NaN or infinity at index 2 of mode 1"):
        Quantized(bits).save(x)


@pytest.mark.parametrize("fault", ["truncate", "forget the minimum", "swap the halves"])
def test_planted_faults_are_caught(fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bound of half a step is two-sided and tight enough to notice."""
    x = np.random.default_rng(0).standard_normal((6, 4, 3, 3)) + 1
    assert (np.abs(restored(x, 4) - x) <= largest_error(x, 4)).all()
    saved = quantise(x, 1, 4)
    if fault == "truncate":
        monkeypatch.setattr(quantized.np, "rint", np.floor)
        saved = quantise(x, 1, 4)
    elif fault == "forget the minimum":
        saved["minimum"] = np.zeros(4)
    else:
        saved["codes"] = saved["codes"] >> 4 | saved["codes"] << 4
    wrong = dequantise(saved, x.shape, 1, 4)
    assert not (np.abs(wrong - x) <= largest_error(x, 4)).all()


def test_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as fit the workspace; with two codes to a byte an even number, at least two."""
    for room, of_8, of_4 in ((7, [7, 3], [6, 4]), (1, [1] * 10, [2] * 5), (50, [10], [10])):
        monkeypatch.setattr(quantized, "WORKSPACE_BYTES", room * 5 * 4)
        for bits, sizes in ((8, of_8), (4, of_4)):
            blocks = list(quantized.row_blocks((10, 5), 4, bits))
            assert [block.stop - block.start for block in blocks] == sizes
            assert [block.start for block in blocks] == [sum(sizes[:i]) for i in range(len(sizes))]
