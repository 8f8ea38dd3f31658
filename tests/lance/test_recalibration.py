"""A layer that keeps too little of its activations is calibrated again, and only then."""

from __future__ import annotations

import numpy as np
import pytest

import lance_ref
from lance_ref import F, calibrate, compress, count_macs, nn, optim, tape
from lance_ref.lance.recalibration import Recalibrator, measure_energy
from lance_ref.stores import Lance
from lance_ref.train.training import StepInfo

Batch = tuple[np.ndarray, np.ndarray]


def batches(directions: slice, count: int, seed: int) -> list[Batch]:
    """Inputs that live in a few of eight directions."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        x = np.zeros((16, 8), np.float32)
        x[:, directions] = rng.standard_normal((16, 8))[:, directions]
        made.append((x, rng.integers(0, 3, 16)))
    return made


OLD, NEW = slice(0, 3), slice(4, 7)


def compressed(**options: object) -> tuple[nn.Module, lance_ref.Calibration]:
    net = nn.Sequential(nn.Linear(8, 6, rng=0), nn.ReLU(), nn.Linear(6, 3, rng=1))
    calibration = calibrate(net, [x for x, _ in batches(OLD, 4, 0)], layers=["0"], epsilon=0.95, modes=["feature"])
    compress(net, calibration, **options)  # type: ignore[arg-type]
    return net, calibration


def train(net: nn.Module, watch: Recalibrator, data: list[Batch]) -> list[float | None]:
    """A step for each batch; what the first layer kept at each."""
    optimizer = optim.SGD(list(net.parameters()), lr=0.05)
    kept = []
    for step, (x, y) in enumerate(data):
        watch(StepInfo(step, 0, len(data), net, x, y))
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        kept.append(net.get_submodule("0").store.energy_kept)
    return kept


def test_a_domain_shift_is_seen_and_mended() -> None:
    """Other directions come: nothing is kept, the alarm goes off after the window, then all is kept again."""
    net, calibration = compressed()
    reference = measure_energy(net, batches(OLD, 4, 0))
    assert reference["0"] > 0.9
    watch = Recalibrator(calibration, reference, share=0.8, window=3, batches=4)
    before = net.get_submodule("0").store.ranks
    kept = train(net, watch, batches(OLD, 5, 1) + batches(NEW, 15, 2))
    assert [event.layer for event in watch.events] == ["0"]
    event = watch.events[0]
    # the shift is at step 5; one bad step of three is 2/3 of the reference; then four batches are collected
    assert event.step == 10
    assert event.energy_before < 0.8 * event.reference == pytest.approx(0.8 * reference["0"])
    assert event.macs == 4 * 16 * 8 * 8 + 9 * 8**3 // 2
    assert max(kept[5:10]) < 0.01
    assert min(kept[10:]) > 0.9
    assert net.get_submodule("0").store.ranks == before


def test_nothing_happens_without_a_shift() -> None:
    """Activations like those of calibration raise no alarm, and cost nothing."""
    net, calibration = compressed()
    watch = Recalibrator(calibration, measure_energy(net, batches(OLD, 4, 0)), window=3)
    store = net.get_submodule("0").store
    with count_macs() as counter:
        train(net, watch, batches(OLD, 30, 3))
    assert watch.events == []
    assert net.get_submodule("0").store is store
    assert counter.by_kind()["calibration"] == 0


def test_its_cost_is_counted_where_the_step_is() -> None:
    """The Gram matrices appear as calibration in the counter around the training."""
    net, calibration = compressed()
    watch = Recalibrator(calibration, measure_energy(net, batches(OLD, 4, 0)), window=2, batches=2)
    with count_macs() as counter:
        train(net, watch, batches(NEW, 6, 4))
    assert counter.by_kind()["calibration"] == 2 * 16 * 8 * 8


def test_a_second_shift_is_seen_too() -> None:
    """What a layer keeps after it was calibrated again is its new reference."""
    net, calibration = compressed()
    watch = Recalibrator(calibration, measure_energy(net, batches(OLD, 4, 0)), window=2, batches=2)
    train(net, watch, batches(NEW, 12, 5) + batches(OLD, 12, 6))
    assert len(watch.events) == 2


def test_codes_and_sketches_stay() -> None:
    """The new store keeps the options of the old one, and its place in the sequence of random sketches."""
    net, calibration = compressed(core_bits=8, batch_mode="sketch", batch_ratio=0.5, seed=3)
    watch = Recalibrator(calibration, measure_energy(net, batches(OLD, 4, 0)), window=2, batches=2)
    train(net, watch, batches(NEW, 8, 7))
    store = net.get_submodule("0").store
    assert watch.events
    assert isinstance(store, Lance)
    assert (store.core_bits, store.batch_mode) == (8, "sketch")
    assert store.sketch is not None
    assert store.sketch.ratio == 0.5


def test_the_tape_stays_as_small() -> None:
    """Ranks do not change, so the bytes do not."""
    net, calibration = compressed()
    x, y = batches(NEW, 1, 8)[0]
    before = tape(F.cross_entropy(net(x), y)).total_bytes
    watch = Recalibrator(calibration, measure_energy(net, batches(OLD, 4, 0)), window=2, batches=2)
    train(net, watch, batches(NEW, 8, 8))
    assert watch.events
    assert tape(F.cross_entropy(net(x), y)).total_bytes == before


def test_bad_arguments() -> None:
    """Each names what came and what was expected."""
    net, calibration = compressed()
    with pytest.raises(ValueError, match="share is 0"):
        Recalibrator(calibration, {"0": 0.9}, share=0)
    with pytest.raises(ValueError, match="window is 0"):
        Recalibrator(calibration, {"0": 0.9}, window=0)
    with pytest.raises(ValueError, match="reference names layer '7'"):
        Recalibrator(calibration, {"7": 0.9})
    with pytest.raises(ValueError, match="reference of layer '0' is nan"):
        Recalibrator(calibration, {"0": float("nan")})
    with pytest.raises(ValueError, match="batches is empty"):
        measure_energy(net, [])
    lance_ref.restore(net)
    with pytest.raises(ValueError, match="no layer of the network is compressed"):
        measure_energy(net, batches(OLD, 1, 0))
    with pytest.raises(TypeError, match="store 'exact', expected one that LANCE"):
        train(net, Recalibrator(calibration, {"0": 0.9}), batches(OLD, 1, 0))
