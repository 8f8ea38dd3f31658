"""Bad values of arguments are refused by name, with what came and what was expected; none becomes a silent NaN."""

from __future__ import annotations

import io
import math
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from lance_ref import F, Tensor, calibrate, nn
from lance_ref.algebra.modes import fold, mode_product, unfold
from lance_ref.algebra.subspace import Subspace
from lance_ref.algebra.tucker import gram, hosvd, st_hosvd
from lance_ref.continual import bases
from lance_ref.datasets.files import decode
from lance_ref.lance.asi_ranks import choose_ranks
from lance_ref.nn.utils import clip_grad_norm_
from lance_ref.optim import SGD, Adam, CosineAnnealingLR
from lance_ref.stores import Lance

X = np.ones((2, 3, 4, 4), np.float32)
ONE, ZERO = np.ones(3, np.float32), np.zeros(3, np.float32)
W = Tensor(np.ones((2, 3, 3, 3), np.float32))


def parameters() -> list[Tensor]:
    return [Tensor(np.ones(2, np.float32), requires_grad=True)]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: F.batch_norm(X, ZERO, -ONE), r"running_var holds -1\.0, expected variances"),
        (lambda: F.batch_norm(X, ZERO, ONE * np.nan), "running_var holds nan"),
        (lambda: F.batch_norm(X, ZERO, ONE, eps=math.inf), "batch_norm: eps is inf, expected a positive, finite"),
        (lambda: F.batch_norm(X, ZERO, ONE, eps=math.nan), "eps is nan"),
        (lambda: F.batch_norm(X, ZERO, ONE, eps=-1e-5), "eps is -1e-05"),
        (lambda: F.batch_norm(X, ZERO, ONE, eps=True), "eps is True"),
        (lambda: F.batch_norm(X, ZERO, ONE, eps="1"), "eps is '1'"),
        (lambda: F.batch_norm(X, ZERO, ONE, True, momentum=None), "bias is None"),
        (lambda: F.batch_norm(X, ZERO, ONE, momentum=None), r"momentum is None, expected a number in \[0, 1\]"),
        (lambda: F.batch_norm(X, ZERO, ONE, momentum=math.nan), "momentum is nan"),
        (lambda: F.batch_norm(X[:, :, :0], ZERO, ONE), r"\(2, 3, 0, 4\), expected sizes of at least 1"),
        (lambda: F.layer_norm(X, 4, eps=math.inf), "layer_norm: eps is inf"),
        (lambda: nn.BatchNorm2d(3, momentum=None), "BatchNorm2d: momentum is None.*cumulative average.*not supported"),
        (lambda: nn.BatchNorm1d(3, momentum=2), "BatchNorm1d: momentum is 2"),
        (lambda: nn.BatchNorm2d(3, eps=0), "BatchNorm2d: eps is 0"),
        (lambda: nn.LayerNorm(3, eps=math.nan), "LayerNorm: eps is nan"),
        (lambda: nn.LayerNorm([]), r"normalized_shape is \[\]"),
        (lambda: nn.LayerNorm("3"), "normalized_shape is '3'"),
        (lambda: F.dropout(X, True), "p is True"),
        (lambda: F.dropout(X, math.nan), "p is nan"),
        (
            lambda: F.softmax(X[:, :0], 1),
            r"softmax: x has shape \(2, 0, 4, 4\), expected at least one entry along dim 1",
        ),
        (lambda: F.log_softmax(X[:0], 0), r"log_softmax: x has shape \(0, 3, 4, 4\)"),
        (lambda: F.conv2d(X, Tensor(np.ones((2, 3, 0, 3), np.float32))), r"weight has shape \(2, 3, 0, 3\)"),
        (lambda: F.conv2d(X, Tensor(np.ones((0, 3, 1, 3), np.float32))), r"weight has shape \(0, 3, 1, 3\)"),
        (lambda: F.conv2d(X, W, stride=True), "stride is True"),
        (lambda: F.conv2d(X, W, dilation=(1, False)), r"dilation is \(1, False\)"),
        (lambda: F.conv2d(X, W, groups=True), "groups is True"),
        (lambda: F.max_pool2d(X, 0), "kernel_size is 0"),
        (lambda: F.avg_pool2d(X, (2, 0)), r"kernel_size is \(2, 0\)"),
        (lambda: F.avg_pool2d(X, True), "kernel_size is True"),
        (lambda: F.adaptive_avg_pool2d(X, 0), "output_size is 0"),
        (lambda: hosvd(X[:0], epsilon=0.5), r"hosvd: tensor has shape \(0, 3, 4, 4\), which is empty"),
        (lambda: st_hosvd(X[:, :, :0], ranks=(1, 1, None, 1)), r"\(2, 3, 0, 4\), which is empty"),
        (lambda: hosvd(np.float32(1), epsilon=0.5), "expected float32 or float64"),
        (lambda: hosvd(np.array(1.0), epsilon=0.5), r"shape \(\), expected at least one mode"),
        (lambda: hosvd(X * np.float32(np.nan), epsilon=0.5), "NaN or infinity"),
        (lambda: hosvd(X, epsilon=math.nan), "epsilon is nan"),
        (lambda: hosvd(X, ranks=(True, 1, 1, 1)), "rank of mode 0 is True"),
        (lambda: gram(X[:0], 1), "which is empty"),
        (lambda: unfold(X, True), "mode is True"),
        (lambda: mode_product(X, np.ones((2, 3), np.float32), True), "mode is True"),
        (lambda: clip_grad_norm_(parameters(), math.nan), "max_norm is nan"),
        (lambda: clip_grad_norm_(parameters(), True), "max_norm is True"),
        (lambda: clip_grad_norm_(parameters(), "1"), "max_norm is '1'"),
        (lambda: SGD(parameters(), lr=True), "lr is True"),
        (lambda: SGD(parameters(), nesterov="no"), "nesterov is 'no', expected True or False"),
        (lambda: Adam(parameters(), betas=(True, 0.9)), "beta1 is True"),
        (lambda: CosineAnnealingLR(SGD(parameters()), 3, eta_min=True), "eta_min is True"),
        (lambda: bases.update_protected(None, np.array([[1.0, 2.0], [2.0, 1.0]]), 0.5), "no Gram matrix"),
        (lambda: bases.task_subspace(np.diag([1.0, 0.0, 0.0]) - 0.1 * np.ones((3, 3)), None, 0.5), "no Gram matrix"),
        (
            lambda: bases.update_protected(np.eye(2)[:, :1], np.array([[1.0, 2.0], [2.0, 1.0]]), 0.5),
            "no Gram matrix",  # what is left of it beside M is not negative
        ),
        (lambda: bases.update_protected(None, np.full((2, 2), np.inf), 0.5), "K of shape .* contains NaN or infinity"),
        (
            lambda: Subspace((2, 3), ("batch", "feature"), (None, np.full((3, 1), np.nan)), (None, None)),
            "factor of mode 'feature' is float64 or not finite",
        ),
        (lambda: choose_ranks({}, True), "budget_bytes is True"),
        (lambda: choose_ranks({}, math.nan), "budget_bytes is nan"),
    ],
)
def test_a_bad_value_is_named(call: Any, says: str) -> None:
    """A ValueError or TypeError at the call, not an error of NumPy's inside, and no result."""
    with pytest.raises((ValueError, TypeError), match=says), np.errstate(invalid="ignore"):
        call()


def test_rounding_is_no_indefinite_matrix() -> None:
    """Gram matrices of float32 samples, of low rank, and of zeros are as good as any."""
    R = np.random.default_rng(0).standard_normal((40, 3)).astype(np.float32)
    assert bases.update_protected(None, R @ R.T, 1 - 1e-5).added == 3
    assert bases.update_protected(None, np.zeros((3, 3)), 0.9).added == 0


@pytest.mark.parametrize("frozen", [False, True])
def test_normalising_no_images(frozen: bool) -> None:
    """A batch of none, as the last part of a split may be, gives none, and zero gradients."""
    layer = nn.BatchNorm2d(3).eval()
    layer.frozen = frozen
    x = Tensor(X[:0], requires_grad=True)
    y = layer(x)
    assert y.shape == (0, 3, 4, 4)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 3, 4, 4)
    assert layer.weight is not None
    np.testing.assert_array_equal(layer.weight.grad, ZERO)
    with pytest.raises(ValueError, match="more than one value per channel"):
        nn.BatchNorm2d(3)(Tensor(X[:0]))


# ---- pictures whose notes are damaged ----------------------------------------------------------

PIXELS = np.arange(6 * 4 * 3, dtype=np.uint8).reshape(6, 4, 3)
TURNED = b"MM\x00*\x00\x00\x00\x08\x00\x01\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00\x00\x00\x00\x00"
NOTES = {
    "no notes at all": b"rubbish",
    "an entry beyond the end": TURNED[:10],
    "an offset beyond the end": TURNED[:4] + b"\xff\xff\xff\xff" + TURNED[8:],
    "an orientation that is a text": TURNED[:12] + b"\x00\x02" + TURNED[14:],
    "an orientation of 99": TURNED.replace(b"\x00\x06", b"\x00\x63"),
    "nothing": b"",
}


def with_notes(format: str, notes: bytes) -> bytes:
    """A lossless picture with these EXIF bytes, as they are."""
    file = io.BytesIO()
    Image.fromarray(PIXELS).save(file, format, lossless=True, **({"exif": b"Exif\x00\x00" + notes} if notes else {}))
    data = file.getvalue()
    if format == "PNG" and notes:  # the checksum of the chunk is right: the notes are what is damaged
        chunk = b"eXIf" + notes
        whole = struct.pack(">I", len(notes)) + chunk + struct.pack(">I", zlib.crc32(chunk))
        start = data.find(b"eXIf") - 4
        length = struct.unpack(">I", data[start : start + 4])[0] if start >= 0 else 0
        data = data[:33] + whole + data[33:] if start < 0 else data[:start] + whole + data[start + 12 + length :]
    return data


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
@pytest.mark.parametrize("name", NOTES)
def test_a_sound_picture_with_damaged_notes_is_read(format: str, name: str) -> None:
    """The pixels are all there; what a camera noted beside them is of no matter."""
    np.testing.assert_array_equal(decode(with_notes(format, NOTES[name]), "a", None), PIXELS)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_a_sound_note_is_followed(format: str, orientation: int) -> None:
    """All eight orientations, as Pillow itself turns them."""
    from PIL import ImageOps

    data = with_notes(format, TURNED.replace(b"\x00\x06", bytes([0, orientation])))
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_array_equal(decode(data, "a", None), expected)
    assert (expected.shape == PIXELS.shape) == (orientation < 5)


def test_damaged_pixels_are_still_refused() -> None:
    """Half a picture is none, whatever its notes say."""
    data = with_notes("PNG", b"rubbish")
    with pytest.raises(ValueError, match="a: not a readable image"):
        decode(data[: len(data) // 2], "a", None)


# ---- one fault each --------------------------------------------------------------------------


def test_the_features_of_a_grouped_convolution_are_those_of_all_groups() -> None:
    """Protected directions are of C_in channels, though the weight has C_in/groups."""
    net = nn.Sequential(nn.Conv2d(6, 4, 2, groups=2, rng=0))
    x = np.random.default_rng(0).standard_normal((3, 6, 4, 4)).astype(np.float32)
    M = np.linalg.qr(np.random.default_rng(1).standard_normal((6, 2)))[0]
    U = calibrate(net, [x], epsilon=1, protected={"0": M})["0"].factors[1]
    assert U is not None
    assert U.shape == (6, 4)
    np.testing.assert_allclose(U.T @ M, 0, atol=1e-12)
    with pytest.raises(ValueError, match=r"expected \(6, m\)"):
        calibrate(net, [x], protected={"0": M[:3]})


def test_centring_and_the_store_agree_on_a_step() -> None:
    """A centred layer keeps the core of A − μ and its share of the energy."""
    net = nn.Sequential(nn.Linear(4, 2, rng=0))
    x = 5 + np.random.default_rng(0).standard_normal((8, 4)).astype(np.float32)
    space = calibrate(net, [x], epsilon=0.6, modes=["feature"], center=True)["0"]
    store = Lance(space)
    store.save(x)
    assert store.energy_kept == pytest.approx(space.energy_kept[1], rel=1e-4)


def test_fold_and_unfold_of_nothing() -> None:
    """Empty arrays have unfoldings too."""
    empty = np.zeros((0, 3, 2))
    for mode in range(3):
        matrix = unfold(empty, mode)
        assert fold(matrix, mode, empty.shape).shape == empty.shape
