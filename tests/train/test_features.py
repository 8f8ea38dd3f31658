"""The frozen part run once: what may be cut off, that it changes nothing, and when a file of outputs is used."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_nets import ThreeLayers

from lance_ref import F, Tensor, calibrate, compress, datasets, fit, models, nn, tape, tune
from lance_ref.datasets import Dataset
from lance_ref.engine.state import state
from lance_ref.io.whole_file import STALE_SECONDS
from lance_ref.train import training
from lance_ref.train.features import Features, Part, extract, frozen_stages, stages_of, tail
from lance_ref.train.training import evaluate


def digits(split: str = "train", limit: int = 96) -> Dataset:
    return datasets.load_digits(split, limit=limit)


class Net(nn.Module):
    """Two convolutions with batch norm, then a hidden layer with dropout and the head; `stages` cut it in four."""

    def __init__(self, dtype: Any = np.float32) -> None:
        super().__init__()
        rng = np.random.default_rng(1)
        self.conv1, self.bn1 = nn.Conv2d(1, 4, 3, padding=1, rng=rng), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 6, 3, padding=1, stride=2, rng=rng), nn.BatchNorm2d(6)
        self.hidden = nn.Linear(6 * 16, 16, rng=rng)
        self.drop = nn.Dropout(0.25, rng=7)
        self.head = nn.Linear(16, 10, rng=rng)
        for bn in (self.bn1, self.bn2):
            bn.running_mean = rng.standard_normal(bn.num_features).astype(np.float32) / 4
            bn.running_var = rng.uniform(0.02, 0.2, bn.num_features).astype(np.float32)
        self.to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        return self.head(self.drop(F.relu(self.hidden(F.flatten(x, 1)))))

    def stages(self) -> list[Any]:
        return [
            nn.Sequential(self.conv1, self.bn1, nn.ReLU()),
            nn.Sequential(self.conv2, self.bn2, nn.ReLU()),
            nn.Sequential(nn.Flatten(), self.hidden, nn.ReLU(), self.drop),
            self.head,
        ]


def tuned(selection: str = "last:1", dtype: Any = np.float32, train_batchnorm: bool = False) -> Net:
    net = Net(dtype)
    tune(net, selection, train_batchnorm=train_batchnorm)
    return net


# ---- what may be cut off --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selection", "count", "why"),
    [
        ("last:1", 2, "stage 2 trains"),
        ("head", 2, "stage 2 has dropout"),
        ("last:2", 1, "stage 1 trains"),
        ("all", 0, "stage 0 trains"),
    ],
)
def test_the_part_ends_where_something_changes(selection: str, count: int, why: str) -> None:
    """Before the first stage that trains or drops; the reason is given."""
    assert frozen_stages(tuned(selection)) == (count, why)


def test_other_ends_of_the_part() -> None:
    """Batch norm with the batch's statistics, hooks, functions; frozen stages without parameters are not worth it."""
    net = tuned()
    net.bn2.frozen = False
    assert frozen_stages(net) == (1, "stage 1 has a batch norm that uses the statistics of the batch")
    net = tuned()
    net.bn2.track_running_stats = False
    assert frozen_stages(net)[0] == 1
    net = tuned("head")
    net.drop.p = 0.0
    assert frozen_stages(net) == (3, "stage 3 trains")
    remove = net.bn2.register_forward_pre_hook(lambda *_: None)
    assert frozen_stages(net) == (1, "stage 1 has a hook")
    remove()
    net.register_forward_pre_hook(lambda *_: None)
    assert frozen_stages(net) == (0, "there is a hook on the network")
    assert frozen_stages(ThreeLayers()) == (0, "ThreeLayers has no stages()")
    assert frozen_stages(nn.Sequential(nn.Flatten(), nn.Linear(2, 2))) == (0, "stage 1 trains")

    class WithFunction(Net):
        def stages(self) -> list[Any]:
            return [super().stages()[0], F.relu, *super().stages()[1:]]

    net = WithFunction()
    tune(net, "head")
    assert frozen_stages(net) == (1, "stage 1 is a function, which may hold anything")


# ---- the same training ------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "rtol"), [(np.float32, 2e-4), (np.float64, 1e-10)])
def test_training_with_and_without_is_the_same_to_rounding(dtype: Any, rtol: float) -> None:
    """Parameters, accuracies and tape after training on features are those of training on images."""
    settings: Any = {"epochs": 2, "batch_size": 16, "normalise": (0.3, 0.4), "eval_batch_size": 7}
    nets, results = [], []
    for cache in (None, False, True):
        nets.append(tuned(dtype=dtype))
        results.append(fit(nets[-1], digits(), digits("test", 30), cache_frozen=cache, **settings))
    assert [result.cached for result in results] == [True, False, True]
    assert nets[0].hidden.weight.dtype == dtype
    for name, array in nets[0].state_dict().items():
        np.testing.assert_allclose(nets[1].state_dict()[name], array, rtol=rtol, atol=rtol / 10)
        assert np.array_equal(nets[2].state_dict()[name], array), "the same setting twice"
    for once, always in zip(results[0].history, results[1].history, strict=True):
        assert once["loss"] == pytest.approx(always["loss"], rel=rtol)
        for name in ("tape_bytes", "learning_rate", "train_accuracy", "test_accuracy"):
            assert once[name] == always[name]
    assert not np.array_equal(nets[0].hidden.weight.data, Net(dtype).hidden.weight.data)
    itemsize = np.dtype(dtype).itemsize
    assert results[0].cache_note == (
        f"The first 2 of 4 stages are frozen and ran once over all images ({126 * 96 * itemsize:,} bytes of outputs)."
    )
    assert results[1].cache_note == "The whole network ran at every step: this was asked for."


def test_features_in_place_of_the_images() -> None:
    """Given features train and evaluate to the same bits as those that fit makes itself."""
    ours, given = tuned(), tuned()
    train, test = extract(given, digits()), extract(given, digits("test", 30))
    a = fit(ours, digits(), digits("test", 30), epochs=2, batch_size=16)
    b = fit(given, train, test, epochs=2, batch_size=16)
    assert all(np.array_equal(ours.state_dict()[name], array) for name, array in given.state_dict().items())
    assert b.cached
    assert b.cache_note == "The outputs of the first 2 of 4 stages were given."
    assert a.test_accuracy == b.test_accuracy == evaluate(given, test) == evaluate(given, digits("test", 30))


def test_what_fit_may_not_run_once() -> None:
    """Random changes of the images, too many bytes, nothing frozen: done without, or an error if it was demanded."""
    rng = np.random.default_rng(0)

    def augment(images: np.ndarray) -> np.ndarray:
        flipped = images[:, :, :: -1 if rng.random() < 0.5 else 1]  # (B, H, W, C)
        return np.ascontiguousarray(flipped.transpose(0, 3, 1, 2), np.float32) + np.float32(rng.random())

    result = fit(tuned(), digits(), epochs=1, batch_size=32, normalise=augment)
    assert not result.cached
    assert result.cache_note == "The whole network ran at every step: normalise gives something else at each call."
    with pytest.raises(ValueError, match="cannot be run once: normalise gives something else"):
        fit(tuned(), digits(), epochs=1, batch_size=32, normalise=augment, cache_frozen=True)
    with pytest.raises(ValueError, match="cannot be run once: stage 0 trains"):
        fit(tuned("all"), digits(), epochs=1, batch_size=32, cache_frozen=True)
    assert fit(tuned("all"), digits(), epochs=1, batch_size=32).cache_note.endswith("stage 0 trains.")


def test_the_bound_on_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that just fit are made, one byte less of room and they are not; exact sizes in the note."""
    needed = (96 + 30) * 96 * 4
    data = digits(), digits("test", 30)
    monkeypatch.setattr(training, "MAX_FEATURE_BYTES", needed)
    assert fit(tuned(), *data, epochs=1, batch_size=32).cached
    monkeypatch.setattr(training, "MAX_FEATURE_BYTES", needed - 1)
    result = fit(tuned(), *data, epochs=1, batch_size=32)
    assert not result.cached
    assert result.cache_note.endswith(f"the outputs take {needed:,} bytes, more than {needed - 1:,}.")
    with pytest.raises(ValueError, match=f"take {needed:,} bytes"):
        fit(tuned(), *data, epochs=1, batch_size=32, cache_frozen=True)


# ---- parts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", range(5))
def test_features_are_the_output_of_the_first_stages(stage: int) -> None:
    """Both parts together are the network, bit by bit, in either mode; a part's layers have the network's paths."""
    net = tuned("head")
    net.drop.p = 0.0
    x = np.random.default_rng(0).standard_normal((5, 1, 8, 8)).astype(np.float32)
    body, rest = Part(net, stages_of(net)[:stage]), tail(net, stage)
    for mode in (True, False):
        net.train(mode)
        assert np.array_equal(rest(body(x)).data, net(x).data)
    assert [path for path, _ in rest.named_modules()] == [path for path, _ in net.named_modules()]
    assert rest.get_submodule("bn2") is net.bn2
    assert rest.tuning is net.tuning
    assert dict(rest.named_parameters()).keys() == net.state_dict().keys() - dict(net.named_buffers()).keys()
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        _ = rest.nothing_of_that_name


def test_a_tail_trains_the_layers_of_the_net_under_their_paths() -> None:
    """Tape by layer, compression and gradients of a step on features are those of a step on images."""
    net = models.create("convnet", in_channels=1, rng=0)
    tune(net, "last:1")
    data = digits(limit=20)
    features = extract(net, data)
    rest = tail(net, features.stage)
    x = next(datasets.batches(data, 20, shuffle=False))[0]
    for compressed in (False, True):
        if compressed:
            compress(rest, calibrate(rest, [features.arrays], epsilon=0.8))
        rows, gradients = [], []
        for make in (lambda: net(x), lambda: rest(np.asarray(features.arrays))):
            loss = F.cross_entropy(make(), data.labels)
            rows.append(tape(loss).by_layer())
            net.zero_grad()
            loss.backward()
            gradients.append(net.conv3.weight.grad)
        assert rows[0] == rows[1]
        assert rows[0]["conv3"] > 0
        np.testing.assert_allclose(gradients[1], gradients[0], rtol=1e-4, atol=1e-6)
    assert net.conv3.store.name == "lance"


def test_features_of_another_network_are_refused() -> None:
    """Other weights or statistics in the frozen part; another part; what trains may differ."""
    net = tuned()
    features = extract(net, digits())
    net.head.weight.data = net.head.weight.data + 1
    assert 0 <= evaluate(net, features) <= 1
    net.bn1.running_mean = net.bn1.running_mean + 1
    with pytest.raises(ValueError, match=r"train is Features\('digits'.*first stages differ"):
        fit(net, features, epochs=1, batch_size=32)
    with pytest.raises(ValueError, match="data is Features"):
        evaluate(nn.Sequential(nn.Linear(2, 2)), features)


def test_extract_refuses_what_it_cannot_do() -> None:
    """Nothing frozen, nothing to run over, and a bad batch size."""
    with pytest.raises(ValueError, match="no frozen part to run once: stage 0 trains"):
        extract(tuned("all"), digits())
    with pytest.raises(ValueError, match=r"digits \(train\) has no images"):
        extract(tuned(), digits().subset([]))
    with pytest.raises(ValueError, match="batch_size is 0"):
        extract(tuned(), digits(), batch_size=0)


def test_extract_leaves_the_net_as_it_was(capsys: pytest.CaptureFixture[str]) -> None:
    """Modes, statistics and values; a bar if wanted."""
    net = tuned()
    net.bn1.eval()
    modes, before = [module.training for module in net.modules()], net.state_dict()
    features = extract(net, digits(), batch_size=50, progress=True)
    assert [module.training for module in net.modules()] == modes
    assert all(np.array_equal(net.state_dict()[name], array) for name, array in before.items())
    assert "96/96" in capsys.readouterr().err
    assert (features.arrays.shape, features.arrays.dtype) == ((96, 6, 4, 4), np.float32)
    assert (features.stage, features.num_classes) == (2, 10)
    assert np.array_equal(features.labels, digits().labels)


# ---- files ------------------------------------------------------------------------------------


@pytest.fixture
def writes(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that are written from now on."""
    written: list[Path] = []
    replace = os.replace

    def note(temporary: str, path: Path) -> None:
        written.append(path)
        replace(temporary, path)

    monkeypatch.setattr(os, "replace", note)
    return written


def test_a_file_is_mapped_and_made_once(tmp_path: Path, writes: list[Path]) -> None:
    """The second call computes nothing, in the same chunks or others; the values are those without a file."""
    path = tmp_path / "digits[1].npy"
    first = extract(tuned(), digits(), batch_size=40, path=path)
    assert isinstance(first.arrays, np.memmap)
    assert np.array_equal(first.arrays, extract(tuned(), digits(), batch_size=40).arrays)
    assert writes == [path, path.with_name("digits[1].npy.json")]
    again = extract(tuned(), digits(), batch_size=33, path=path)
    assert len(writes) == 2
    assert again.fingerprint == first.fingerprint
    assert sorted(os.listdir(tmp_path)) == ["digits[1].npy", "digits[1].npy.json"]
    by_file, in_memory = tuned(), tuned()
    fit(by_file, again, epochs=1, batch_size=32)
    fit(in_memory, extract(in_memory, digits(), batch_size=40), epochs=1, batch_size=32)
    assert np.array_equal(by_file.hidden.weight.data, in_memory.hidden.weight.data)


def other_pixel() -> Dataset:
    data = digits()
    images = data.images.copy()
    images[-1, 3, 3] ^= 1
    return Dataset(data.name, data.split, images, data.labels, data.class_names, data.source)


def other_weight() -> Net:
    net = tuned()
    net.conv1.weight.data = net.conv1.weight.data * np.float32(1 + 1e-6)
    return net


def other_buffer() -> Net:
    net = tuned()
    net.bn2.running_var = net.bn2.running_var * np.float32(1 + 1e-6)
    return net


def other_epsilon() -> Net:
    net = tuned()
    net.bn1.eps = 2e-5
    return net


def rewrite(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    return lambda path: np.save(path, change(np.load(path)))


def spoil_behind_the_back(path: Path) -> None:
    """Other values under the old size and time."""
    times, arrays = path.stat(), np.load(path)
    np.save(path, arrays + 1)
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))


@pytest.mark.parametrize(
    "change",
    [
        {"net": other_weight},
        {"net": other_buffer},
        {"net": other_epsilon},
        {"net": lambda: tuned("last:2")},
        {"dataset": other_pixel},
        {"dataset": lambda: digits(limit=95)},
        {"normalise": (0.1, 1.0)},
        {"image_size": 12},
        {"spoil": lambda path: path.write_bytes(path.read_bytes()[:-1])},
        {"spoil": lambda path: path.unlink()},
        {"spoil": rewrite(lambda a: a + 1)},
        {"spoil": spoil_behind_the_back},
        {"spoil": lambda path: np.save(path, np.array([{}], dtype=object), allow_pickle=True)},
        {"spoil": lambda path: Path(f"{path}.json").write_bytes(b"\xff{")},
        {"spoil": lambda path: Path(f"{path}.json").write_text("[]")},
        {"spoil": lambda path: Path(f"{path}.json").unlink()},
    ],
    ids=lambda change: next(iter(change)),  # pytest numbers those that are equal
)
def test_a_file_that_does_not_fit_is_made_anew(change: dict[str, Any], tmp_path: Path, writes: list[Path]) -> None:
    """Whatever differs: weights, statistics, settings, cut, pixels, preparation, or the file itself."""
    path = tmp_path / "digits.npy"
    extract(tuned(), digits(), path=path)
    change.get("spoil", lambda path: None)(path)
    net, data = change.get("net", tuned)(), change.get("dataset", digits)()
    settings = {name: change[name] for name in ("normalise", "image_size") if name in change}
    if "image_size" in settings:
        net.hidden = nn.Linear(6 * 36, 16, rng=0)
    features = extract(net, data, path=path, **settings)
    assert len(writes) == 4
    assert np.array_equal(features.arrays, extract(net, data, **settings).arrays)
    extract(net, data, path=path, **settings)
    assert len(writes) == 4


def test_a_full_disk_leaves_nothing_and_no_state_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error comes through; no part of a file; gradients are still recorded and the net is in its mode."""
    net = tuned()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array_header_1_0", full)
    with pytest.raises(OSError, match="No space left") as caught:
        extract(net, digits(), path=tmp_path / "digits.npy")
    assert caught.value.errno == errno.ENOSPC
    assert os.listdir(tmp_path) == []
    assert state.grad_enabled
    assert net.training


def test_what_a_dead_process_left_is_cleared(tmp_path: Path) -> None:
    """Unfinished files of this name, once they are old; a living process's is not touched, nor is another's."""
    old, new = (tmp_path / f".digits.npy.{digit * 12}.unfinished" for digit in "12")
    other = tmp_path / f".other.npy.{'1' * 12}.unfinished"
    for file in (old, new, other):
        file.write_bytes(b"")
    long_ago = time.time() - 2 * STALE_SECONDS
    for file in (old, other):
        os.utime(file, (long_ago, long_ago))
    extract(tuned(), digits(), path=tmp_path / "digits.npy")
    assert [file.exists() for file in (old, new, other)] == [False, True, True]


def test_the_sidecar_never_outlives_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed between the two writes, the old description must not vouch for the new file."""
    path = tmp_path / "digits.npy"
    extract(tuned(), digits(), path=path)
    old = json.loads(Path(f"{path}.json").read_text())
    replace = os.replace

    def die_at_the_second(temporary: str, target: Path) -> None:
        if target.suffix == ".json":
            raise KeyboardInterrupt
        replace(temporary, target)

    monkeypatch.setattr(os, "replace", die_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        extract(other_weight(), digits(), path=path)
    assert path.exists()
    assert not Path(f"{path}.json").exists()
    assert set(old) == {"fingerprint", "checksum", "sha256"}


def test_features_say_what_they_are() -> None:
    """For reports and errors."""
    features = extract(tuned(), digits())
    assert isinstance(features, Features)
    assert repr(features) == "Features('digits', 'train', 96 of 6x4x4 after stage 2)"
    assert len(features) == 96


def test_no_flipped_bit_of_a_file_is_used(tmp_path: Path) -> None:
    """A file that decayed on the disk is made anew, wherever the bit lies; in the description too."""
    path = tmp_path / "digits.npy"
    truth = np.array(extract(tuned(), digits(), path=path).arrays)
    for file in (path, Path(f"{path}.json")):
        whole, rng = file.read_bytes(), np.random.default_rng(0)
        for _ in range(12):
            damaged = bytearray(whole)
            damaged[rng.integers(len(whole))] ^= 1 << int(rng.integers(8))
            file.write_bytes(bytes(damaged))
            assert np.array_equal(extract(tuned(), digits(), path=path).arrays, truth)


def test_another_process_with_another_network_on_the_same_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is given is what this call computed, even if another process's file takes its place right away."""
    path, replace = tmp_path / "digits.npy", os.replace
    other = extract(other_weight(), digits(), path=tmp_path / "other.npy").arrays
    truth = np.array(extract(tuned(), digits()).arrays)

    def overtaken(temporary: str, target: Path) -> None:
        replace(temporary, target)
        if target.suffix == ".npy":
            target.unlink()
            target.write_bytes((tmp_path / "other.npy").read_bytes())

    monkeypatch.setattr(os, "replace", overtaken)
    found = extract(tuned(), digits(), path=path).arrays
    assert np.array_equal(found, truth)
    assert not np.array_equal(found, other)
