"""fit with its batches in chunks of images: the same step, a smaller tape, and a whole batch where that is not so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lance_ref import F, Tensor, calibrate, compress, fit, nn, stores, tape, tune
from lance_ref.datasets import Dataset
from lance_ref.nn.module import Module
from lance_ref.train import chunks
from lance_ref.train.chunks import Chunks, chunks_of

BATCH = 8
KINDS: dict[str, dict[str, Any]] = {"stride": {"stride": 2}, "dilation": {"dilation": 2}, "padding": {"padding": 1}}


def images(count: int = 2 * BATCH, size: int = 6, channels: int = 3) -> Dataset:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, size, size, channels), dtype=np.uint8)
    return Dataset("toy", "train", pixels, np.arange(count) % 3, ("a", "b", "c"), "made here")


def small_net(kind: str = "stride", middle: Module | None = None, dtype: Any = np.float64) -> nn.Sequential:
    rng = np.random.default_rng(3)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, rng=rng, **KINDS[kind]), nn.ReLU(),
        nn.Conv2d(4, 4, 2, groups=2, rng=rng), middle or nn.ReLU6(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3, rng=rng),
    ).to(dtype)  # fmt: skip


def trained(net: Module, chunk: int | str | None, **options: Any) -> tuple[Any, dict[str, np.ndarray]]:
    """Two epochs without clipping, which would hide a factor."""
    result = fit(net, images(), epochs=2, batch_size=BATCH, lr=0.3, clip_norm=None, chunk=chunk, **options)
    return result, net.state_dict()


def assert_close(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, array in expected.items():
        assert array.dtype == np.float64
        np.testing.assert_allclose(found[name], array, rtol=1e-12, atol=1e-13, err_msg=name)


@given(st.sampled_from(sorted(KINDS)), st.integers(1, BATCH))
@settings(max_examples=12)
def test_chunks_make_the_step_of_the_whole_batch(kind: str, chunk: int) -> None:
    """Weights, losses and accuracies, to rounding in float64; chunks are equal, 2 for 3 of 8."""
    whole, expected = trained(small_net(kind), None)
    parts, found = trained(small_net(kind), chunk)
    assert_close(found, expected)
    assert parts.chunk == max(k for k in (1, 2, 4, 8) if k <= chunk)
    assert whole.chunk == BATCH
    assert whole.chunk_note == ""
    for a, b in zip(whole.history, parts.history, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-12)
        assert b["train_accuracy"] == a["train_accuracy"]


def test_by_default_the_batch_stays_whole_to_the_bit() -> None:
    """Who asks for nothing gets the numbers of a loop over whole batches."""
    found = [trained(small_net(), chunk)[1] for chunk in (None, BATCH)]
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])


def test_a_tape_is_that_of_a_chunk() -> None:
    """Two images at a time keep a fourth of what eight keep: every array of this net has a row for each image."""
    whole, parts = (trained(small_net(dtype=np.float32), chunk)[0] for chunk in (None, 2))
    signs = 2 * (BATCH // 8)  # a bit for each element, in whole bytes
    kept = [result.history[0]["tape_bytes"] for result in (whole, parts)]
    assert abs(kept[0] - 4 * kept[1]) <= 4 * signs
    assert parts.chunk_note == "Each step took its 8 images 2 at a time."


def test_auto_takes_as_many_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """Results of one image: 4·2·2 twice; 4·1·1 in convolution, ReLU6, pool and the look at it; three scores.

    Gradients: 4·3·9 + 4, 4·2·4 + 4, and 3·4 + 3 numbers, as many as the results of three images.
    """
    net, gradients = small_net(dtype=np.float32), (108 + 4) + (32 + 4) + (12 + 3)
    numbers = 2 * (4 * 2 * 2) + 2 * (4 * 1 * 1) + 4 + 4 + 3
    assert 3 * numbers <= gradients < 4 * numbers
    for images_at_a_time in (4, 8):
        monkeypatch.setattr(chunks, "AUTO_BYTES", 4 * numbers * images_at_a_time + 3)
        assert chunks_of(net, (3, 6, 6), np.float32, BATCH, "auto").images == images_at_a_time
    monkeypatch.setattr(chunks, "AUTO_BYTES", 1)
    assert chunks_of(net, (3, 6, 6), np.float32, 9, "auto").images == 3
    tune(net, "head")  # what is before the head gets no gradients: 15 numbers of the head, three scores an image
    assert chunks_of(net, (3, 6, 6), np.float32, 10, "auto").images == 5
    net[6].weight.requires_grad_(False)  # three numbers
    assert chunks_of(net, (3, 6, 6), np.float32, 10, "auto").images == 1


def test_dropout_draws_what_the_whole_batch_draws() -> None:
    """Of odd numbers of elements too, and of two layers, each with a generator of its own."""
    for chunk in (1, 2):
        found = []
        for of in (None, chunk):
            net = small_net(middle=nn.Dropout(0.4, rng=1))
            net._modules["7"] = nn.Dropout(0.2, rng=2)  # of three scores
            found.append(trained(net, of)[1])
        assert_close(found[1], found[0])


def test_dropouts_on_one_generator_keep_the_batch_whole() -> None:
    """Chunks would draw for layer 2 what the whole batch draws for layer 1."""
    rng = np.random.default_rng(0)
    net = small_net(middle=nn.Dropout(0.4, rng=rng))
    net._modules["1"] = nn.Dropout(0.2, rng=rng)
    result, _ = trained(net, 2)
    assert result.chunk == BATCH
    assert result.chunk_note == "Each batch stayed whole: several dropouts draw from one random generator."


class Mixed(Module):
    """What a user may do to a batch."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        if self.how == "mean":
            return x - x.mean(0, keepdim=True)
        if self.how == "softmax":
            return F.softmax(x, 0)
        if self.how == "first":
            return x + x[0:1]
        return x * Tensor(x.data.mean())  # looks at values


@pytest.mark.parametrize(
    ("middle", "why"),
    [
        (nn.BatchNorm2d(4), "batch_norm in 3 uses the statistics of the batch"),
        (Mixed("mean"), "mean in 3 mixes the images of a batch"),
        (Mixed("softmax"), "softmax in 3 runs along the batch"),
        (Mixed("first"), "index in 3 mixes the images of a batch"),
        (Mixed("values"), "the network cannot be traced on shapes alone"),
    ],
)
def test_what_mixes_images_keeps_the_batch_whole(middle: Module, why: str) -> None:
    """The step is the one without chunks, bit by bit, and a sentence says why."""
    found = []
    for chunk in ("auto", 2, None):
        result, values = trained(small_net(middle=middle), chunk)
        found.append({name: value.copy() for name, value in values.items() if "running" not in name})
        assert result.chunk == BATCH
        if chunk is not None:
            assert result.chunk_note.startswith(f"Each batch stayed whole: {why}")
        if isinstance(middle, nn.BatchNorm2d):
            middle.load_state_dict(nn.BatchNorm2d(4).to(np.float64).state_dict())
    assert all(np.array_equal(found[0][name], found[2][name]) for name in found[0])


def test_frozen_batch_norm_mixes_nothing() -> None:
    """After tune() a batch norm uses its running statistics, in training mode as well."""
    net = small_net(middle=nn.BatchNorm2d(4))
    tune(net, "last:1")
    assert chunks_of(net, (3, 6, 6), np.float64, BATCH, 2).images == 2


@pytest.mark.parametrize("name", ["all modes", "no batch", "codes", "sketch", "hosvd", "quantized", "filter"])
def test_stores_that_see_the_whole_batch(name: str) -> None:
    """Cores without a batch mode are those of each image; directions, ranges and sketches of a batch are not."""
    net = small_net()
    tune(net, "last:1")
    x = [images().images.transpose(0, 3, 1, 2)[:BATCH] / 255]
    modes = ("channel", "height", "width") if name == "no batch" else ("batch", "channel", "height", "width")
    if name in ("all modes", "no batch"):
        compress(net, calibrate(net, x, epsilon=0.9, modes=modes))
    elif name in ("codes", "sketch"):
        options: dict[str, Any] = {"core_bits": 8} if name == "codes" else {"batch_mode": "sketch"}
        compress(net, calibrate(net, x, epsilon=0.9, modes=("channel", "height", "width")), **options)
    else:
        own = {"hosvd": stores.Hosvd(0.9), "quantized": stores.Quantized(8), "filter": stores.GradientFilter(2)}
        net[2].store = own[name]
    found = chunks_of(net, (3, 6, 6), np.float64, BATCH, 2)
    if name in ("no batch", "filter"):
        assert found == Chunks(2, "Each step took its 8 images 2 at a time.")
    else:
        assert found.images == BATCH
        assert f"the store {net[2].store.name!r} of 2 keeps depends on all images of a batch" in found.note


def test_lance_without_a_batch_mode_learns_the_same_in_chunks() -> None:
    """The weight gradient from the cores of a batch is the sum of those from the cores of its chunks."""
    found = []
    for chunk in (None, 3):
        net = small_net()
        tune(net, "last:1")
        x = [images().images.transpose(0, 3, 1, 2)[:BATCH] / 255]
        compress(net, calibrate(net, x, epsilon=0.9, modes=("channel", "height", "width"), center=True))
        found.append(trained(net, chunk)[1])
    assert_close(found[1], found[0])


def test_a_checkpoint_of_other_chunks_is_refused(tmp_path: Path) -> None:
    """Going on with them would not end bit by bit as the run would have."""
    trained(small_net(), 2, checkpoint=tmp_path / "run.npz")
    with pytest.raises(ValueError, match="chunk is 2 there and 4 here"):
        trained(small_net(), 4, checkpoint=tmp_path / "run.npz")


class OwnStore(Module):
    """A layer that holds its store under another name."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(np.ones((4, 4, 1, 1)))
        self.kept = stores.Quantized(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, store=self.kept)


def test_a_store_that_no_layer_holds() -> None:
    """Nobody can ask it."""
    note = chunks_of(small_net(middle=OwnStore()), (3, 6, 6), np.float64, BATCH, 2).note
    assert note == "Each batch stayed whole: conv2d in 3 has a store 'quantized' that is no layer's."


def test_recomputed_segments_are_looked_into() -> None:
    """A batch norm inside of a segment mixes images, a convolution does not."""
    plain, mixing = (small_net(middle=nn.Recompute(nn.Sequential(m))) for m in (nn.ReLU(), nn.BatchNorm2d(4)))
    assert chunks_of(plain, (3, 6, 6), np.float64, BATCH, 2).images == 2
    assert "uses the statistics" in chunks_of(mixing, (3, 6, 6), np.float64, BATCH, 2).note


def test_planted_a_chunk_with_the_weight_of_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chunk whose mean loss counts as much as the batch's is seen."""
    from lance_ref.train import run

    of_chunks = run.FitRun._chunks

    def heavy(self: Any, x: np.ndarray, y: np.ndarray) -> Any:
        for each in of_chunks(self, x, y):
            yield run.Pass(each.head, each.x, each.y, 1.0)

    expected = trained(small_net(), None)[1]
    monkeypatch.setattr(run.FitRun, "_chunks", heavy)
    with pytest.raises(AssertionError):
        assert_close(trained(small_net(), 2)[1], expected)


def test_the_tape_of_a_chunk_does_not_hold_the_batch() -> None:
    """A chunk is no look at the batch, whose memory it would keep on the tape."""
    from lance_ref.train.run import FitRun

    seen: list[np.ndarray] = []
    original = FitRun.forward

    def forward(self: Any, each: Any) -> Tensor:
        seen.append(each.x)
        loss = original(self, each)
        assert tape(loss).total_bytes < 8 * each.x.size * 8
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FitRun, "forward", forward)
        trained(small_net(), 3)
    assert {x.base is None for x in seen} == {True}
    assert [len(x) for x in seen[:5]] == [2, 2, 2, 2, 2]
