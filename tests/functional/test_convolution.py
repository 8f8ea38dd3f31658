"""Convolution and linear layers: three products, against loops, PyTorch and finite differences."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import arrays, conv_geometries, linear_geometries

from lance_ref import F, Tensor, count_macs, nn, tape
from lance_ref.algebra import geometry
from lance_ref.algebra.geometry import ConvGeometry, LinearGeometry


def loops(g: ConvGeometry, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The definition, one output at a time."""
    out = np.zeros(g.output_shape, x.dtype)
    (top, bottom), (left, right) = g.padding
    padded = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)))
    in_width, out_width = weight.shape[1], weight.shape[0] // g.groups
    for b, o, h, w in itertools.product(*map(range, out.shape)):
        for c, p, q in itertools.product(*map(range, weight.shape[1:])):
            row, column = h * g.stride[0] + p * g.dilation[0], w * g.stride[1] + q * g.dilation[1]
            out[b, o, h, w] += weight[o, c, p, q] * padded[b, (o // out_width) * in_width + c, row, column]
    return out


@given(g=conv_geometries(), seed=st.integers(0, 99))
def test_forward_equals_the_definition(g: ConvGeometry, seed: int) -> None:
    """A wrong patch, pad or group would show."""
    x, weight, _ = arrays(g, seed)
    np.testing.assert_allclose(g.forward(x, weight), loops(g, x, weight), rtol=1e-12, atol=1e-12)


@given(g=st.one_of(conv_geometries(), linear_geometries()), seed=st.integers(0, 99))
def test_gradients_are_the_adjoints_of_forward(g: Any, seed: int) -> None:
    """⟨Y(X, W), G⟩ is linear in X and in W, so ⟨X, dX⟩ = ⟨W, dW⟩ = ⟨Y, G⟩, and for any other X, W too."""
    x, weight, grad_output = arrays(g, seed)
    other_x, other_weight, _ = arrays(g, seed + 1000)
    grad_x, grad_weight = g.input_gradient(weight, grad_output), g.weight_gradient(x, grad_output)
    assert grad_x.shape == x.shape
    assert grad_weight.shape == weight.shape
    expected_x = np.vdot(g.forward(other_x, weight), grad_output)
    expected_weight = np.vdot(g.forward(x, other_weight), grad_output)
    np.testing.assert_allclose(np.vdot(grad_x, other_x), expected_x, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(np.vdot(grad_weight, other_weight), expected_weight, rtol=1e-9, atol=1e-9)


@given(g=conv_geometries(), seed=st.integers(0, 99), bias=st.booleans(), double=st.booleans())
def test_conv2d_equals_pytorch(g: ConvGeometry, seed: int, bias: bool, double: bool) -> None:
    """Output and all gradients, through the tape, against PyTorch's own convolution."""
    torch = pytest.importorskip("torch")
    dtype, tolerance = (np.float64, 1e-10) if double else (np.float32, 2e-4)
    x, weight, grad_output = arrays(g, seed, dtype)
    b = np.linspace(-1, 1, weight.shape[0]).astype(dtype) if bias else None
    ours = [Tensor(a, requires_grad=True) for a in (x, weight)] + ([Tensor(b, requires_grad=True)] if bias else [])
    out = F.conv2d(*ours, stride=g.stride, padding=g.padding, dilation=g.dilation, groups=g.groups)
    out.backward(grad_output)
    theirs = [torch.tensor(a, requires_grad=True) for a in (x, weight) + ((b,) if bias else ())]
    (top, bottom), (left, right) = g.padding
    padded = torch.nn.functional.pad(theirs[0], (left, right, top, bottom))
    expected = torch.nn.functional.conv2d(padded, *theirs[1:], stride=g.stride, dilation=g.dilation, groups=g.groups)
    expected.backward(torch.tensor(grad_output))
    assert out.dtype == dtype
    np.testing.assert_allclose(out.data, expected.detach().numpy(), rtol=tolerance, atol=tolerance)
    for mine, peer in zip(ours, theirs, strict=True):
        assert mine.grad is not None
        assert mine.grad.dtype == dtype
        np.testing.assert_allclose(mine.grad, peer.grad.numpy(), rtol=tolerance, atol=tolerance)


@given(g=conv_geometries(), seed=st.integers(0, 99))
def test_blocks_change_nothing(g: ConvGeometry, seed: int) -> None:
    """Cutting the columns into blocks, down to one output row of one image, gives the same products."""
    x, weight, grad_output = arrays(g, seed)
    whole = g.forward(x, weight), g.input_gradient(weight, grad_output), g.weight_gradient(x, grad_output)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "WORKSPACE_BYTES", 1)
        cut = g.forward(x, weight), g.input_gradient(weight, grad_output), g.weight_gradient(x, grad_output)
    for a, b in zip(whole, cut, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-11)


def test_multiply_adds_of_a_convolution_by_hand() -> None:
    """B=2, C_in=6, H=9, W=8, C_out=4, 3x2 kernel, groups 2, stride (2, 1): 2·4·4·7·(3·3·2) each."""
    g = ConvGeometry((2, 6, 9, 8), (4, 3, 3, 2), (2, 1), groups=2)
    x, weight, grad_output = arrays(g, 0)
    assert g.output_shape == (2, 4, 4, 7)
    for product in (
        lambda: g.forward(x, weight),
        lambda: g.input_gradient(weight, grad_output),
        lambda: g.weight_gradient(x, grad_output),
    ):
        with count_macs() as counter:
            product()
        assert sum(counter.macs.values()) == 2 * 4 * 4 * 7 * (3 * 3 * 2) == 4032


@given(g=st.one_of(conv_geometries(), linear_geometries()), seed=st.integers(0, 9))
def test_executed_multiply_adds_are_those_of_the_formula(g: Any, seed: int) -> None:
    """Output elements times inputs seen by each, for all three products: C_in or groups forgotten would show."""
    x, weight, grad_output = arrays(g, seed)
    expected = int(np.prod(g.output_shape)) * int(np.prod(g.weight_shape[1:]))
    with count_macs() as counter:
        g.forward(x, weight), g.input_gradient(weight, grad_output), g.weight_gradient(x, grad_output)
    assert counter.by_kind()["forward"] == 3 * expected


def test_each_kind_is_booked_where_it_belongs() -> None:
    """Forward, input gradient and weight gradient of a layer appear under its path and kind."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 5, 3, bias=False))
    net[0].weight.requires_grad_(False)
    x = Tensor(np.ones((2, 3, 6, 6), np.float32), requires_grad=True)
    with count_macs() as counter:
        net(x).sum().backward()
    first, second = 2 * 4 * 36 * 3, 2 * 5 * 16 * 36
    assert counter.by_layer("0") == {
        "forward": first, "grad_input": first, "grad_weight": 0, "projection": 0, "decomposition": 0,
        "recompute": 0, "calibration": 0,
    }  # fmt: skip
    assert counter.by_layer("1") == {
        "forward": second, "grad_input": second, "grad_weight": second, "projection": 0, "decomposition": 0,
        "recompute": 0, "calibration": 0,
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_what_is_saved(dtype: type) -> None:
    """The input for the weight gradient, the weight for the input gradient; nothing that is not needed."""
    x = np.ones((2, 3, 5, 5), dtype)
    weight, bias = (Tensor(np.ones(s, dtype)) for s in ((4, 3, 2, 2), (4,)))
    bias.requires_grad_()
    assert tape(F.conv2d(x, weight, bias).sum()).total_bytes == 0
    weight.requires_grad_()
    report = tape(F.conv2d(x, weight, bias).sum())
    assert [(e.what, e.nbytes) for e in report.entries] == [("activation", x.nbytes)]
    weight.requires_grad_(False)
    report = tape(F.conv2d(Tensor(x, requires_grad=True), weight, bias).sum())
    assert [(e.what, e.nbytes) for e in report.entries] == [("weight", weight.data.nbytes)]


@pytest.mark.parametrize(
    ("size", "kernel", "stride", "expected"),
    [
        (8, 3, 1, (1, 1)),
        (8, 3, 2, (0, 1)),
        (7, 3, 2, (1, 1)),
        (8, 4, 1, (1, 2)),
        (5, 1, 2, (0, 0)),
        (224, 3, 2, (0, 1)),
    ],
)
def test_same_padding_puts_the_odd_zero_last(size: int, kernel: int, stride: int, expected: tuple[int, int]) -> None:
    """max((ceil(i/s) − 1)·s + k − i, 0) in all, half of it, rounded down, before."""
    x, weight = Tensor.meta((1, 1, size, size)), Tensor.meta((1, 1, kernel, kernel))
    out = F.conv2d(x, weight, stride=stride, padding="same")
    assert out.shape[2] == -(-size // stride)
    explicit = F.conv2d(
        np.arange(size * size, dtype=np.float64).reshape(1, 1, size, size),
        Tensor(np.ones((1, 1, kernel, kernel))),
        stride=stride,
        padding=(expected, expected),
    )
    same = F.conv2d(
        np.arange(size * size, dtype=np.float64).reshape(1, 1, size, size),
        Tensor(np.ones((1, 1, kernel, kernel))),
        stride=stride,
        padding="same",
    )
    np.testing.assert_array_equal(explicit.data, same.data)


def image(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.ones(shape, dtype)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda: F.conv2d(image(3, 5, 5), Tensor(image(4, 3, 2, 2))), ValueError, r"\(3, 5, 5\).*4 dimensions"),
        (lambda: F.conv2d(image(1, 3, 5, 5), Tensor(image(4, 3, 2))), ValueError, r"weight.*\(4, 3, 2\)"),
        (lambda: F.conv2d(image(1, 3, 5, 5), Tensor(image(4, 2, 2, 2))), ValueError, r"\(4, 2, 2, 2\).*\(C_out, 3"),
        (lambda: F.conv2d(image(1, 3, 5, 5), Tensor(image(4, 3, 2, 2)), groups=2), ValueError, "groups is 2.*divisor"),
        (lambda: F.conv2d(image(1, 3, 5, 5), Tensor(image(4, 3, 2, 2)), groups=0), ValueError, "groups is 0"),
        (lambda: F.conv2d(image(1, 3, 5, 5), Tensor(image(4, 3, 7, 7))), ValueError, "output would be empty"),
        (lambda: F.conv2d(image(1, 3, 5, 5), Tensor(image(4, 3, 2, 2)), stride=0), ValueError, "stride is 0"),
        (lambda: F.conv2d(image(1, 3, 5, 5), Tensor(image(4, 3, 2, 2)), padding=-1), ValueError, "padding is -1"),
        (lambda: F.conv2d(image(1, 3, 5, 5), Tensor(image(4, 3, 2, 2)), padding="full"), ValueError, "'full'"),
        (lambda: F.conv2d(image(1, 3, 5, 5), Tensor(image(4, 3, 2, 2)), Tensor(image(3))), ValueError, r"bias.*\(3,\)"),
        (lambda: F.conv2d(image(1, 3, 5, 5, dtype=np.int64), Tensor(image(4, 3, 2, 2))), TypeError, "int64"),
        (lambda: F.conv2d(image(1, 3, 5, 5, dtype=np.float64), Tensor(image(4, 3, 2, 2))), TypeError, "float64"),
        (lambda: F.linear(image(2, 3), Tensor(image(4, 5))), ValueError, r"\(2, 3\).*\(\.\.\., 5\)"),
        (lambda: F.linear(image(2, 3), Tensor(image(3))), ValueError, r"weight has shape \(3,\)"),
        (lambda: F.linear(image(2, 3), Tensor(image(4, 3)), Tensor(image(5))), ValueError, r"bias.*\(5,\)"),
        (lambda: F.linear(image(2, 3, dtype=np.int32), Tensor(image(4, 3))), TypeError, "int32"),
    ],
)
def test_bad_input_is_named(call: Any, error: type[Exception], says: str) -> None:
    """The error says which argument, what came and what was expected."""
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize("dilation", [(1, 1), (2, 3)])
def test_same_padding_reaches_as_far_as_the_dilated_kernel(dilation: tuple[int, int]) -> None:
    """dilation·(k − 1) zeros with stride 1: the output keeps the size of the image."""
    x, weight = np.random.default_rng(0).standard_normal((2, 2, 9, 9)), Tensor(np.ones((1, 2, 3, 3)))
    d_h, d_w = dilation
    same = F.conv2d(x, weight, padding="same", dilation=dilation)
    assert same.shape == (2, 1, 9, 9)
    by_hand = F.conv2d(x, weight, padding=((d_h, d_h), (d_w, d_w)), dilation=dilation)
    np.testing.assert_array_equal(same.data, by_hand.data)


def test_linear_takes_any_number_of_leading_axes() -> None:
    """(I,), (B, I), (B, L, I), (B, L, M, I) are all X Wᵀ."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((4, 5))
    for shape in ((5,), (2, 5), (2, 3, 5), (2, 3, 2, 5)):
        x = rng.standard_normal(shape)
        g = LinearGeometry(shape, weight.shape)
        np.testing.assert_allclose(F.linear(x, Tensor(weight)).data, x @ weight.T)
        assert g.output_shape == (*shape[:-1], 4)


@given(g=conv_geometries(), bytes_=st.integers(1, 9000), cached=st.integers(1, 9000), data=st.data())
def test_the_workspace_is_kept(g: ConvGeometry, bytes_: int, cached: int, data: st.DataObject) -> None:
    """Columns are within the workspace that all threads share, but for a single row, and no more than a cache or four
    times the weights take, whichever are more; no more images are put together than a product needs."""
    (H_out, W_out), (B, C_in), kernel = g.output_size, g.input_shape[:2], math.prod(g.weight_shape[2:])
    parts, places = data.draw(st.integers(1, 3)), data.draw(st.sampled_from([1, 20, 512]))
    some = max(C_in // 2, 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(geometry, "WORKSPACE_BYTES", bytes_)
        patch.setattr(geometry, "CACHED_BYTES", cached)
        patch.setattr(geometry, "ENOUGH_PLACES", places)
        patch.setattr(geometry, "MANY_PLACES", places)
        patch.setattr(geometry, "SHARED_MACS", 0)
        patch.setattr(geometry, "product_threads", lambda: parts)
        threads, of_images, of_channels = g.image_parts(), g.image_block(4), g.channel_block(4, some)
    assert threads == min(parts, B)
    assert of_images[0] <= -(-B // threads)
    assert of_images[0] == 1 or of_images[0] * H_out * W_out <= places
    room = min(bytes_ // threads, max(cached, 4 * 4 * math.prod(g.weight_shape)))
    own_room = min(bytes_, cached) if H_out * W_out >= places else bytes_
    for (n, rows), channels, most in ((of_images, C_in, room), (of_channels, some, own_room)):
        assert 4 * n * rows * W_out * channels * kernel <= most or (n, rows) == (1, 1)
        assert n == 1 or rows == H_out


@given(g=conv_geometries(), images=st.integers(1, 4), rows=st.integers(1, 20))
def test_blocks_cover_every_row_once(g: ConvGeometry, images: int, rows: int) -> None:
    """Of a thread's images, here all but the first."""
    seen = []
    for some, lines in g.blocks(range(1, g.input_shape[0]), (images, rows)):
        assert some.stop - some.start <= images
        assert lines.stop - lines.start <= rows
        seen += list(itertools.product(range(some.start, some.stop), range(lines.start, lines.stop)))
    assert sorted(seen) == list(itertools.product(range(1, g.input_shape[0]), range(g.output_size[0])))


def test_which_convolutions_are_depthwise_or_pointwise() -> None:
    """Depthwise are several groups of one input channel; pointwise is a plain 1×1 kernel, nothing else."""
    assert ConvGeometry((2, 4, 5, 5), (8, 1, 3, 3), groups=4).is_depthwise
    assert not ConvGeometry((2, 1, 5, 5), (8, 1, 3, 3)).is_depthwise
    assert not ConvGeometry((2, 4, 5, 5), (8, 2, 3, 3), groups=2).is_depthwise
    assert ConvGeometry((2, 4, 5, 5), (8, 4, 1, 1)).is_pointwise
    assert not ConvGeometry((2, 4, 5, 5), (8, 4, 1, 1), (2, 1)).is_pointwise
    assert not ConvGeometry((2, 4, 5, 5), (8, 4, 1, 1), padding=((0, 0), (0, 1))).is_pointwise
    assert not ConvGeometry((2, 4, 5, 5), (8, 2, 1, 1), groups=2).is_pointwise
    assert not ConvGeometry((2, 4, 5, 5), (8, 4, 1, 2)).is_pointwise
