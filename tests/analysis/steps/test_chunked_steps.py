"""Steps in chunks of images, predicted: by hand, against what really runs, and as fit() decides."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from analysis.check import torch_replay
from analysis.check.measure import compare
from analysis.cost_model import cost, main, predict
from analysis.peak.stores import STORES
from analysis.steps import chunks as step_chunks
from lance_ref import models, nn, stores, tune
from lance_ref.algebra.subspace import Subspace
from lance_ref.lance.patches import PatchLance
from lance_ref.stores import Lance
from lance_ref.train import chunks
from lance_ref.train.chunks import chunks_of

MLP: dict[str, Any] = {"batch": 8, "input_shape": (20,), "num_classes": 10, "tune": "all"}


@pytest.fixture(name="without_pytorch")
def _without_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_replay, "available", lambda: False)


def test_a_chunk_has_its_tape_and_the_batch_its_work() -> None:
    """Of 100 hidden numbers, twice, in chunks of two images; a chunk of three is one of two, a divisor of eight."""
    plain, parts, same = (cost("mlp", method="bp", chunk=chunk, **MLP) for chunk in (None, 2, 3))
    assert parts.totals["bp"].flops == plain.totals["bp"].flops
    assert parts.totals["bp"].activation_bytes["paper"] * 4 == plain.totals["bp"].activation_bytes["paper"]
    assert parts.totals["bp"].activation_bytes["tape"] == 2 * (20 + 100 + 100) * 4 + 2 * 25 + 2 * 10 * 4 + 2
    assert same.to_json() == parts.to_json()
    assert parts.chunks == {"bp": "2 images at a time"}
    assert plain.chunks == {}
    assert parts.batch == 8


def test_a_chunk_of_backpropagation_is_a_micro_batch() -> None:
    """One mechanism: the method of that name, and the option."""
    parts = cost("mlp", method="micro-batch", micro_batch=2, **MLP)
    chunked = cost("mlp", method="bp", chunk=2, **MLP)
    assert chunked.totals["bp"] == parts.totals["micro-batch"]
    assert chunked.peaks["bp"] == parts.peaks["micro-batch"]


def test_methods_that_see_the_whole_batch_keep_it() -> None:
    """Each says why, and costs what it costs without chunks."""
    methods = ["bp", "lance", "lance-center", "hosvd", "asi", "int8", "sketch", "gradient-filter", "checkpoint"]
    options: dict[str, Any] = {"batch": 8, "image_size": 32, "num_classes": 10, "tune": "last:2", "ranks": "0.5"}
    plain = cost("convnet", method=methods, **options)
    parts = cost("convnet", method=methods, chunk=2, **options)
    for method in methods:
        whole = "keeps depends on all images of a batch" in parts.chunks[method]
        assert whole == (method not in ("bp", "gradient-filter", "checkpoint")), method
        assert (parts.totals[method] == plain.totals[method]) == whole
        assert (parts.peaks[method] == plain.peaks[method]) == whole
    assert parts.to_json()["chunks"] == parts.chunks


@pytest.mark.usefixtures("without_pytorch")
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_what_runs_in_chunks_is_what_is_predicted(optimizer: str) -> None:
    """Every byte, every multiply-add, and the peak, of stores without a batch mode and checkpointing too."""
    ranks = "conv2=-,4,3,3;conv3=-,6,-,2"
    prediction = predict(
        "convnet", 8, None, (3, 32, 32), 10, "last:2",
        ("bp", "lance", "lance-mean-free", "lance-center", "gradient-filter", "checkpoint", "bias-only"),
        ranks=ranks, with_weights=True, chunk=2, optimizer=optimizer,
    )  # fmt: skip
    assert set(prediction.chunks.values()) == {"2 images at a time"}
    comparison = compare(prediction, peaks=True)
    assert comparison.agrees, str(comparison)


@pytest.mark.usefixtures("without_pytorch")
def test_lora_in_chunks() -> None:
    """The parameters that it adds have gradients from the first chunk on."""
    prediction = predict("mlp", 8, None, (20,), 10, "all", ("lora", "bp"), with_weights=True, chunk=2)
    comparison = compare(prediction, peaks=True)
    assert comparison.agrees, str(comparison)


@pytest.mark.skipif(not torch_replay.available(), reason="PyTorch is not installed")
def test_pytorch_counts_the_work_of_all_chunks() -> None:
    """Its counter sees one chunk, and the batch has four."""
    comparison = compare(predict("convnet", 8, None, (3, 32, 32), 10, "last:2", "bp", with_weights=True, chunk=2))
    assert comparison.agrees, str(comparison)


def test_auto_is_what_fit_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same number of images from the step with its loss and from the net alone."""
    net = models.create("convnet", num_classes=10, rng=0)
    tune(net, "last:2")
    for limit in (1, 30_000, 100_000, 1 << 20, 1 << 30):
        monkeypatch.setattr(chunks, "AUTO_BYTES", limit)
        of_fit = chunks_of(net, (3, 32, 32), np.float32, 24, "auto")
        report = cost("convnet", batch=24, image_size=32, num_classes=10, tune="last:2", method="bp", chunk="auto")
        expected = "each batch stays whole: it is small enough"
        assert report.chunks["bp"] == (expected if of_fit.images == 24 else f"{of_fit.images} images at a time")


def test_batch_statistics_keep_the_batch_whole() -> None:
    """alexnet-cl trains its batch norms: they see the images of a batch together."""
    report = cost("alexnet-cl", batch=8, tune="all", num_classes=10, method="bp", chunk=2)
    assert "uses the statistics of the batch" in report.chunks["bp"]


def test_dropouts_on_one_generator_keep_the_batch_whole() -> None:
    """Chunks would draw other masks; with a generator of its own for each they draw the same."""
    for generators, said in ((1, "several dropouts draw from one random generator"), (2, "2 images at a time")):
        rngs = [np.random.default_rng(i % generators) for i in range(generators)] * (3 - generators)
        net = nn.Sequential(
            nn.Dropout(0.2, rngs[0]), nn.Linear(20, 9, rng=0), nn.Dropout(0.2, rngs[1]), nn.Linear(9, 3)
        )
        report = cost(net, batch=8, input_shape=(20,), tune="all", method="bp", chunk=2)
        assert report.chunks["bp"].endswith(said)


@pytest.mark.parametrize("batch_rank", [None, 2])
def test_the_rules_know_what_the_stores_know(batch_rank: int | None) -> None:
    """Which stores take chunks is said twice, by the store and by its rule."""
    maps = Subspace.random((4, 6, 5, 5), (batch_rank, 2, None, 3), np.random.default_rng(0))
    tokens = Subspace.random((4, 9, 12), (batch_rank, None, 3), np.random.default_rng(0))
    made = [
        stores.Exact(), Lance(maps), Lance(maps, core_bits=8), Lance(maps, batch_mode="sketch"), PatchLance(tokens),
        stores.Hosvd(ranks=(batch_rank, 1, 2, 2)), stores.Asi((batch_rank, 1, 2, 2)), stores.Quantized(8),
        stores.Sketch(0.5, seed=0), stores.GradientFilter(2),
    ]  # fmt: skip
    for store in made:
        assert STORES[store.name].by_image(store.describe()) == store.by_image, store.describe()
    with_chunks = [store.name for store in made if store.by_image]
    fixed = ["exact", "gradient-filter"] if batch_rank else ["exact", "lance", "patch-lance", "gradient-filter"]
    assert with_chunks == fixed


def test_an_unknown_store_keeps_the_batch_whole() -> None:
    """Nobody knows what it does."""
    changed = step_chunks.MethodStep([], stores={"fc": {"name": "theirs"}})
    assert "theirs" in str(step_chunks.mixing_store(changed))


def test_the_command_line_says_how_batches_are_taken(capsys: pytest.CaptureFixture[str]) -> None:
    """In a line beneath the tables; a wrong value is named."""
    arguments = ["--net", "mlp", "--input-shape", "20", "--batch", "8", "--method", "bp", "--chunk"]
    assert main([*arguments, "2"]) == 0
    assert "bp: 2 images at a time" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main([*arguments, "large"])
    assert "--chunk" in capsys.readouterr().err
    with pytest.raises(ValueError, match="chunk is 0"):
        cost("mlp", chunk=0, **MLP)
