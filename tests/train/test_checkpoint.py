"""Checkpoints: all state comes back, another run's is refused by name, and an error leaves everything as it was."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lance_ref import F, Subspace, checkpoint, compress, manual_seed, nn, optim, tune
from lance_ref.engine.random import as_generator
from lance_ref.io.npz import load_npz, save_npz
from lance_ref.stores import Asi, Hosvd, Quantized, Sketch

SHAPE = (6, 2, 5, 5)


def make_net(channels: int = 4, p: float = 0.3, batchnorm: bool = True) -> nn.Sequential:
    """Every kind of state: weights, running statistics, two generators, a warm start, a counter of steps."""
    rng = np.random.default_rng(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 1, rng=rng),
        nn.Conv2d(3, channels, 3, rng=rng),
        nn.BatchNorm2d(channels) if batchnorm else nn.Identity(),
        nn.Dropout(p, rng=np.random.Generator(np.random.SFC64(4))),
        nn.Conv2d(channels, 3, 2, rng=rng),
        nn.Dropout(0.2),
        nn.Flatten(),
        nn.Linear(12, 3, rng=rng),
    )
    tune(net, "last:2", train_batchnorm=True)
    net[1].store = Asi((2, 2, 2, 2), seed=3)
    net[4].store = Sketch(0.5, seed=1)
    return net


def make_all(**options: Any) -> tuple[nn.Sequential, optim.Optimizer, optim.LRScheduler]:
    net = make_net(**options)
    sgd = optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    return net, sgd, optim.CosineAnnealingLR(sgd, T_max=10)


def steps(net: nn.Module, optimizer: optim.Optimizer, scheduler: optim.LRScheduler, count: int, start: int = 0) -> None:
    """Some training; batch i is the same whenever it comes."""
    for i in range(start, start + count):
        rng = np.random.default_rng(i)
        x, y = rng.standard_normal(SHAPE).astype(np.float32), rng.integers(0, 3, len(range(SHAPE[0])))
        optimizer.zero_grad()
        F.cross_entropy(net(x), y).backward()
        optimizer.step()
        scheduler.step()


def everything(net: nn.Module, optimizer: optim.Optimizer, scheduler: optim.LRScheduler) -> dict[str, Any]:
    """All state, found here and not by the code under test."""
    state = {**net.state_dict(), **{f"o.{k}": v for k, v in optimizer.state_dict().items()}}
    state |= {f"s.{k}": v for k, v in scheduler.state_dict().items()}
    for path, module in net.named_modules():
        if hasattr(module, "store"):
            state |= {f"{path}.store.{k}": np.array(v) for k, v in module.store.state().items()}
        if isinstance(module, nn.Dropout) and module.rng is not None:
            state[f"{path}.rng"] = module.rng.bit_generator.state
    return {**state, "default": as_generator(None).bit_generator.state}


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        repr(a[k]) == repr(b[k]) if isinstance(a[k], dict) else np.array_equal(a[k], b[k]) for k in a
    )


@pytest.mark.parametrize("adam", [False, True], ids=["momentum", "Adam"])
def test_training_goes_on_as_if_nothing_had_happened(adam: bool, tmp_path: Path) -> None:
    """Three steps, a checkpoint, three more: bit by bit six steps, whatever the objects were before loading."""

    def fresh() -> Any:
        net, optimizer, scheduler = make_all()
        if adam:
            optimizer = optim.Adam(optimizer.params, lr=0.01)
            scheduler = optim.StepLR(optimizer, 2)
        return net, optimizer, scheduler

    manual_seed(5)
    one = fresh()
    steps(*one, count=3)
    checkpoint.save(tmp_path / "c.npz", *one, meta={"step": 3, "history": [{"loss": 0.1}]})
    steps(*one, count=3, start=3)
    expected = everything(*one)
    manual_seed(99)
    two = fresh()
    steps(*two, count=1, start=77)
    assert checkpoint.load(tmp_path / "c.npz", *two) == {"step": 3, "history": [{"loss": 0.1}]}
    steps(*two, count=3, start=3)
    assert equal(everything(*two), expected)
    assert expected["2.running_mean"].any()
    assert any(name.startswith("1.store.") for name in expected), "the warm start was not tested"


@pytest.mark.parametrize("bits", [np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64])
def test_every_kind_of_generator_goes_on(bits: Any, tmp_path: Path) -> None:
    """Also in the middle of a 64-bit word; a generator in two places is stored once and stays one."""
    shared = np.random.Generator(bits(1))
    net = nn.Sequential(nn.Dropout(0.5, rng=shared), nn.Dropout(0.5, rng=shared), nn.Dropout(0.5))
    shared.integers(0, 10, 3, dtype=np.uint32)
    assert list(checkpoint.generators(net)) == ["default", "0.rng"]
    checkpoint.save(tmp_path / "c.npz", net)
    expected = shared.integers(0, 1000, 5, dtype=np.uint32), shared.random(), as_generator(None).random()
    checkpoint.load(tmp_path / "c.npz", net)
    again = shared.integers(0, 1000, 5, dtype=np.uint32), shared.random(), as_generator(None).random()
    assert np.array_equal(expected[0], again[0])
    assert expected[1:] == again[1:]


def changed(act: Callable[[nn.Sequential], Any]) -> Callable[[], Any]:
    def make() -> Any:
        net = make_net()
        act(net)
        sgd = optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
        return net, sgd, optim.CosineAnnealingLR(sgd, T_max=10)

    return make


def with_other(kind: str) -> Any:
    net, sgd, _ = make_all()
    if kind == "optimizer":
        sgd = optim.Adam(sgd.params)
    return net, sgd, optim.StepLR(sgd, 3) if kind == "scheduler" else optim.CosineAnnealingLR(sgd, T_max=10)


def shift_frozen(net: nn.Sequential) -> None:
    net[0].bias.data = net[0].bias.data + 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_all(channels=5), r"module 1 is Conv2d\(3, 4,.* there and Conv2d\(3, 5,"),
        (lambda: make_all(p=0.4), r"module 3 is Dropout\(p=0.3\) there and Dropout\(p=0.4\) here"),
        (lambda: make_all(batchnorm=False), r"module 2 is BatchNorm2d\(.* there and Identity\(\) here"),
        (changed(lambda net: net.add_module("more", nn.ReLU())), r"module more is absent there and ReLU\(\) here"),
        (changed(lambda net: net.to(np.float64)), r"parameter 0.weight is \[.*'float32', 'frozen'\] there and .*64"),
        (changed(lambda net: tune(net, "last:1")), r"module 2 is .* there and BatchNorm2d\(.*frozen=True\) here"),
        (changed(lambda net: net[7].bias.requires_grad_(False)), r"parameter 7.bias is .*'trains'.*'frozen'"),
        (changed(shift_frozen), "values of the frozen parameters is"),
        (changed(lambda net: setattr(net[1], "store", Hosvd(0.7))), r"module 1 is .*store=asi\) there.*store=hosvd"),
        (changed(lambda net: setattr(net[1], "store", Asi((2, 2, 2, 2), 9))), "store of 1 is .*seed: 3.*seed: 9"),
        (changed(lambda net: setattr(net[4], "store", Sketch(0.25, 1))), "store of 4 is .*ratio: 0.5.*ratio: 0.25"),
        (changed(lambda net: setattr(net[4], "store", Sketch(0.5, 2))), "store of 4 is .*seed: 1.*seed: 2"),
        (changed(lambda net: setattr(net[3], "rng", np.random.default_rng(1))), "generator 3.rng is SFC64 .* PCG64"),
        (lambda: with_other("optimizer"), "optimiser is SGD of 8 there and Adam of 8 here"),
        (lambda: with_other("scheduler"), "schedule is CosineAnnealingLR there and StepLR here"),
        (lambda: (*make_all()[:2], None), "schedule is CosineAnnealingLR there and none here"),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(make: Callable[[], Any], message: str, tmp_path: Path) -> None:
    """In one line that names the difference; nothing has been changed, in memory or on disk."""
    path = tmp_path / "c.npz"
    one = make_all()
    steps(*one, count=1)
    checkpoint.save(path, *one)
    content, other = path.read_bytes(), make()
    before = other[0].state_dict()
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.load(path, *other)
    assert str(caught.value).startswith(f"{path}: is a checkpoint of another run: ")
    assert "\n" not in str(caught.value)
    assert all(np.array_equal(other[0].state_dict()[name], array) for name, array in before.items())
    assert path.read_bytes() == content


def test_the_first_parameter_that_differs_is_named(tmp_path: Path) -> None:
    """That one network is a Sequential and the other is not says little."""
    path = tmp_path / "c.npz"
    checkpoint.save(path, nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 4)))
    for net, message in (
        (
            nn.Sequential(nn.Linear(2, 3), nn.ReLU(), nn.Linear(3, 5)),
            r"module 2 is .* here; parameter 2.weight is \[\[4, 3",
        ),
        (
            nn.Linear(2, 3),
            r"network is Sequential there and Linear here; parameter weight is absent there and \[\[3, 2",
        ),
        (
            nn.Sequential(nn.Linear(2, 3)),
            r"module 1 is ReLU\(\) there and absent here; parameter 2.weight is .* absent here",
        ),
        (
            nn.Sequential(nn.Linear(2, 3), nn.GELU(), nn.Linear(3, 4)),
            r"module 1 is ReLU\(\) there and GELU\([^;]*here$",
        ),
    ):
        with pytest.raises(ValueError, match=f"is a checkpoint of another run: {message}"):
            checkpoint.load(path, net)


def test_other_factors_are_refused(tmp_path: Path) -> None:
    """LANCE's fixed factors are no state, but another calibration is another run; quantisation to fewer bits, too."""
    net = make_net()
    for seed, fits in ((0, True), (0, True), (1, False)):
        space = Subspace.random((6, 3, 5, 5), (2, 2, 2, 2), np.random.default_rng(seed))
        compress(net, {"1": space})
        if not (tmp_path / "c.npz").exists():
            checkpoint.save(tmp_path / "c.npz", net)
        elif fits:
            checkpoint.load(tmp_path / "c.npz", net)
        else:
            with pytest.raises(ValueError, match="store of 1 is"):
                checkpoint.load(tmp_path / "c.npz", net)
    net[1].store = Quantized(8)
    checkpoint.save(tmp_path / "q.npz", net)
    net[1].store = Quantized(4)
    with pytest.raises(ValueError, match=r"store of 1 is .*bits: 8.* there and .*bits: 4"):
        checkpoint.load(tmp_path / "q.npz", net)


def test_other_settings_are_refused(tmp_path: Path) -> None:
    """Settings are compared as JSON, so that tuples may come back as lists; extra and missing ones count."""
    net = make_net()
    checkpoint.save(tmp_path / "c.npz", net, settings={"epochs": 3, "mean": (1, 2)})
    assert checkpoint.load(tmp_path / "c.npz", net, settings={"epochs": 3, "mean": [1, 2]}) == {}
    for settings, message in (
        ({"epochs": 4, "mean": [1, 2]}, "epochs is 3 there and 4 here"),
        ({"epochs": 3}, r"mean is \[1, 2\] there and absent here"),
        ({"epochs": 3, "mean": [1, 2], "seed": 0}, "seed is absent there and 0 here"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint.load(tmp_path / "c.npz", net, settings=settings)
    with pytest.raises(ValueError, match="JSON"):
        checkpoint.save(tmp_path / "c.npz", net, meta={"loss": float("nan")})
    assert checkpoint.load(tmp_path / "c.npz", net, settings={"epochs": 3, "mean": [1, 2]}) == {}


def test_stores_that_vary_from_step_to_step_are_no_difference(tmp_path: Path) -> None:
    """The ranks that HOSVD finds anew at each step belong to the step."""
    one = changed(lambda net: setattr(net[1], "store", Hosvd(0.7)))()
    steps(*one, count=1)
    checkpoint.save(tmp_path / "c.npz", *one)
    assert one[0][1].store.describe()["ranks"] is not None  # known after a step, and not before
    assert checkpoint.load(tmp_path / "c.npz", *changed(lambda net: setattr(net[1], "store", Hosvd(0.7)))()) == {}


SPOILED: list[Callable[[dict[str, np.ndarray]], Any]] = [
    lambda arrays: arrays.pop("net/7.weight"),
    lambda arrays: arrays.update({"net/7.weight": np.zeros((2, 2), np.float32)}),
    lambda arrays: arrays.pop("optimizer/steps"),
    lambda arrays: arrays.update({"optimizer/momentum_buffer.0": np.full(1, np.nan)}),
    lambda arrays: arrays.update({"scheduler/last_epoch": np.array(-1)}),
    lambda arrays: arrays.update({"store/1/nonsense": np.zeros(2)}),
    lambda arrays: arrays.update({"store/0/state": np.zeros(2)}),
    lambda arrays: arrays.update({"about": patched(arrays["about"], b"SFC64", b"SFC65", last=True)}),
    lambda arrays: arrays.update({"about": patched(arrays["about"], b'"3.rng": {', b'"4.rng": {', last=True)}),
]


def patched(text: np.ndarray, old: bytes, new: bytes, last: bool) -> np.ndarray:
    head, _, rest = text.tobytes().rpartition(old)
    return np.frombuffer(head + new + rest, np.uint8)


@pytest.mark.parametrize("spoil", range(len(SPOILED)))
def test_a_damaged_state_changes_nothing(spoil: int, tmp_path: Path) -> None:
    """Whatever part does not fit, even the last one: one line, and all objects are as they were."""
    path = tmp_path / "c.npz"
    one = make_all()
    steps(*one, count=2)
    checkpoint.save(path, *one)
    arrays = load_npz(path)
    SPOILED[spoil](arrays)
    save_npz(path, arrays)
    two = make_all()
    steps(*two, count=1, start=50)
    before = everything(*two)
    with pytest.raises(ValueError, match="the checkpoint does not fit: ") as caught:
        checkpoint.load(path, *two)
    assert "\n" not in str(caught.value)
    assert equal(everything(*two), before)


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    """Cut short at any place, another archive, another format: one line with the name; a missing one is an OSError."""
    net, path = make_net(), tmp_path / "c.npz"
    checkpoint.save(path, net)
    content = path.read_bytes()
    for length in (0, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"c\.npz: ") as caught:
            checkpoint.load(path, net)
        assert "\n" not in str(caught.value)
    good = b'"description": {}, "settings": {}, "generators": {}, "meta": {}'
    for about in (b"{", b"[]", b'{"format": 2}', b'{"format": true, %s}' % good, b"[" * 100_000, b"\xff"):
        save_npz(path, {"about": np.frombuffer(about, np.uint8)})
        with pytest.raises(ValueError, match="is no checkpoint of format 2"):
            checkpoint.load(path, net)
    save_npz(path, {"x": np.zeros(2)})
    with pytest.raises(ValueError, match="is no checkpoint of format 2"):
        checkpoint.load(path, net)
    with pytest.raises(FileNotFoundError):
        checkpoint.load(tmp_path / "none.npz", net)


def rescheduled(**options: Any) -> Callable[[], Any]:
    def make() -> Any:
        net, sgd, _ = make_all()
        return net, sgd, optim.CosineAnnealingLR(sgd, **{"T_max": 10, **options})

    return make


def reoptimised(**options: Any) -> Callable[[], Any]:
    def make() -> Any:
        net, sgd, _ = make_all()
        sgd = optim.SGD(sgd.params, **{"lr": 0.1, "momentum": 0.9, **options})
        return net, sgd, optim.CosineAnnealingLR(sgd, T_max=10)

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (rescheduled(T_max=11), "schedule's T_max is 10 there and 11 here"),
        (rescheduled(eta_min=0.01), "schedule's eta_min is 0.0 there and 0.01 here"),
        (reoptimised(lr=0.2), "optimiser's lr is 0.1 there and 0.2 here"),
        (reoptimised(momentum=0.8), "optimiser's momentum is 0.9 there and 0.8 here"),
        (reoptimised(dampening=0.1), "optimiser's dampening is 0.0 there and 0.1 here"),
        (reoptimised(weight_decay=0.1), "optimiser's weight_decay is 0.0 there and 0.1 here"),
        (reoptimised(nesterov=True), "optimiser's nesterov is False there and True here"),
    ],
)
def test_another_schedule_or_optimiser_is_another_run(make: Callable[[], Any], message: str, tmp_path: Path) -> None:
    """Every setting, also after steps have moved the rate."""
    one = make_all()
    steps(*one, count=3)
    checkpoint.save(tmp_path / "c.npz", *one)
    with pytest.raises(ValueError, match=f"checkpoint of another run: {message}"):
        checkpoint.load(tmp_path / "c.npz", *make())
    assert checkpoint.load(tmp_path / "c.npz", *make_all()) == {}


@pytest.mark.parametrize(
    ("settings", "other"),
    [({"betas": (0.8, 0.99)}, "beta1 is 0.9 there"), ({"eps": 1e-6}, "eps is 1e-08 there"), ({"lr": 1}, "lr is 0.001")],
)
def test_another_adam_is_another_run(settings: dict[str, Any], other: str, tmp_path: Path) -> None:
    """And another step of a StepLR."""
    net = make_net()
    trained = [p for p in net.parameters() if p.requires_grad]
    adam = optim.Adam(trained)
    checkpoint.save(tmp_path / "c.npz", net, adam, optim.StepLR(adam, 3))
    with pytest.raises(ValueError, match=other):
        checkpoint.load(tmp_path / "c.npz", net, optim.Adam(trained, **settings))
    for options, name in (({"step_size": 4}, "step_size is 3"), ({"step_size": 3, "gamma": 0.5}, "gamma is 0.1")):
        with pytest.raises(ValueError, match=name):
            checkpoint.load(tmp_path / "c.npz", net, adam, optim.StepLR(adam, **options))


def casts(name: str, dtype: Any) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda arrays: arrays.update({name: arrays[name].astype(dtype)})


def fills(name: str, value: float) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda arrays: arrays[name].reshape(-1)[-1:].fill(value)


UNSOUND: dict[str, tuple[Callable[[dict[str, np.ndarray]], Any], str]] = {
    "float64 weight": (casts("net/7.weight", np.float64), "net/7.weight has dtype float64, expected float32"),
    "half weight": (casts("net/7.weight", np.float16), "net/7.weight has dtype float16, expected float32"),
    "integer weight": (casts("net/0.bias", np.int32), "net/0.bias has dtype int32, expected float32"),
    "complex weight": (casts("net/1.weight", np.complex64), "net/1.weight has dtype complex64, expected real numbers"),
    "boolean weight": (casts("net/1.weight", bool), "net/1.weight has dtype bool, expected float32"),
    "text": (casts("net/1.weight", "U9"), "net/1.weight has dtype <U9, expected real numbers"),
    "swapped bytes": (casts("net/7.weight", ">f4"), "net/7.weight has dtype >f4, expected float32"),
    "NaN weight": (fills("net/4.weight", np.nan), "net/4.weight holds NaN or infinity"),
    "infinite weight": (fills("net/4.weight", -np.inf), "net/4.weight holds NaN or infinity"),
    "NaN mean": (fills("net/2.running_mean", np.nan), "net/2.running_mean holds NaN"),
    "negative variance": (fills("net/2.running_var", -1e-9), "net/2.running_var holds -.*, expected .* at least 0"),
    "float64 variance": (casts("net/2.running_var", np.float64), "running_var has dtype float64, expected float32"),
    "float64 momentum": (casts("optimizer/momentum_buffer.0", np.float64), "momentum_buffer.0 has dtype float64"),
    "infinite momentum": (fills("optimizer/momentum_buffer.1", np.inf), "momentum_buffer.1 holds NaN or infinity"),
    "fractional steps": (casts("optimizer/steps", np.float64), "optimizer/steps has dtype float64, expected int64"),
    "another lr": (fills("scheduler/base_lr", 0.2), "scheduler/base_lr is 0.2, expected 0.1"),
    "another momentum": (fills("optimizer/momentum", 0.2), "optimizer/momentum is 0.2, expected 0.9"),
    "float epoch": (casts("scheduler/last_epoch", np.float64), "scheduler/last_epoch has dtype float64"),
    "NaN warm start": (fills("store/1/factor_1", np.nan), "store/1/factor_1 holds NaN or infinity"),
    "float64 warm start": (
        casts("store/1/factor_1", np.float64),
        "store/1/factor_1 has dtype float64, expected float32",
    ),
    "integer warm start": (casts("store/1/factor_1", np.int64), "store/1/factor_1 has dtype int64, expected float32"),
    "float counter": (casts("store/2/step", np.float32), "store/2/step has dtype float32, expected int64"),
}


@pytest.mark.parametrize("name", UNSOUND)
@pytest.mark.parametrize("begun", [False, True], ids=["fresh", "begun"])
def test_a_state_that_no_training_leads_to_is_refused(name: str, begun: bool, tmp_path: Path) -> None:
    """With its checksum right: nothing is cast, and nothing is carried along that is no number."""
    path = tmp_path / "c.npz"
    one = make_all()
    steps(*one, count=2)
    checkpoint.save(path, *one)
    arrays = load_npz(path)
    change, message = UNSOUND[name]
    change(arrays)
    save_npz(path, arrays)
    two = make_all()
    steps(*two, count=int(begun), start=50)
    before = everything(*two)
    with pytest.raises(ValueError, match=f"the checkpoint does not fit: .*{message}"):
        checkpoint.load(path, *two)
    assert equal(everything(*two), before)


def test_adams_second_moment_is_not_negative(tmp_path: Path) -> None:
    """Its root would be NaN."""
    net = make_net()
    adam = optim.Adam([p for p in net.parameters() if p.requires_grad])
    schedule = optim.StepLR(adam, 3)
    steps(net, adam, schedule, count=1)
    checkpoint.save(tmp_path / "c.npz", net, adam, schedule)
    arrays = load_npz(tmp_path / "c.npz")
    arrays["optimizer/exp_avg.1"] -= 1  # a mean may have any sign
    save_npz(tmp_path / "c.npz", arrays)
    checkpoint.load(tmp_path / "c.npz", net, adam, schedule)
    arrays["optimizer/exp_avg_sq.1"] -= 1
    save_npz(tmp_path / "c.npz", arrays)
    with pytest.raises(ValueError, match=r"optimizer/exp_avg_sq.1 holds -.* at least 0"):
        checkpoint.load(tmp_path / "c.npz", net, adam, schedule)


def test_what_is_not_finite_is_not_saved(tmp_path: Path) -> None:
    """It could not be loaded; the earlier file stays."""
    net = make_net()
    checkpoint.save(tmp_path / "c.npz", net, meta={"step": 1})
    good = net[7].weight.data
    net[7].weight.data = good * np.float32(np.nan)
    with pytest.raises(ValueError, match=r"net/7.weight holds NaN or infinity"):
        checkpoint.save(tmp_path / "c.npz", net)
    net[7].weight.data = good
    assert checkpoint.load(tmp_path / "c.npz", net) == {"step": 1}


def test_saving_to_a_folder_says_so(tmp_path: Path) -> None:
    """And a missing folder, too."""
    net = nn.Linear(2, 1)
    with pytest.raises(OSError, match=r"not written \(is a folder, expected the name of a file"):
        checkpoint.save(tmp_path, net)
    with pytest.raises(OSError, match=r"not written \(its folder does not exist\)"):
        checkpoint.save(tmp_path / "no" / "c.npz", net)


def test_a_file_without_checksum_is_none_of_ours(tmp_path: Path) -> None:
    """Whatever is in it: such files were written before checkpoints said enough of their run."""
    net = nn.Linear(2, 1)
    checkpoint.save(tmp_path / "c.npz", net)
    np.savez(tmp_path / "c.npz", **load_npz(tmp_path / "c.npz"))
    with pytest.raises(ValueError, match=r"c\.npz: it has no checksum"):
        checkpoint.load(tmp_path / "c.npz", net)


@pytest.mark.parametrize("arrays_before", [0, 1, 7])
def test_a_full_disk_spares_the_earlier_checkpoint(
    arrays_before: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OSError in one line; the earlier file is as it was and fits; no part of the new one is left."""
    path = tmp_path / "c.npz"
    one = make_all()
    checkpoint.save(path, *one, meta={"step": 0})
    content, write, written = path.read_bytes(), np.lib.format.write_array, []

    def fill(*arguments: Any, **options: Any) -> None:
        if len(written) == arrays_before:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(write(*arguments, **options))

    steps(*one, count=1)
    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "write_array", fill)
        with pytest.raises(OSError, match=r"not written \(No space left on device\); an earlier one is") as caught:
            checkpoint.save(path, *one, meta={"step": 1})
    assert caught.value.errno == errno.ENOSPC
    assert "\n" not in str(caught.value)
    assert "c.npz" in str(caught.value)
    assert os.listdir(tmp_path) == ["c.npz"]
    assert path.read_bytes() == content
    assert checkpoint.load(path, *one) == {"step": 0}


def test_leftovers_of_this_checkpoint_alone_are_removed(tmp_path: Path) -> None:
    """A killed process leaves a temporary file; names with wildcards in them are taken literally."""
    for name in ("run[1].npz", ".run[1].npz.abc.unfinished", ".run1.npz.abc.unfinished", ".run[1].npz.tmp.npz"):
        (tmp_path / name).write_bytes(b"")
    checkpoint.checked_path(tmp_path / "run[1].npz")
    assert sorted(os.listdir(tmp_path)) == [".run1.npz.abc.unfinished", ".run[1].npz.tmp.npz", "run[1].npz"]


def test_layers_wrapped_for_recomputation_are_described(tmp_path: Path) -> None:
    """A wrapper without a name of its own hides neither itself nor what it wraps."""
    net = nn.Sequential(nn.Recompute(nn.Sequential(nn.Linear(2, 2, rng=0), nn.Tanh())), nn.Linear(2, 2, rng=1))
    names = list(checkpoint.describe(net))
    assert names[1:6] == ["module (root)", "module 0", "module 0, inside", "module 0.0", "module 0.1"]
    checkpoint.save(tmp_path / "c.npz", net)
    plain = nn.Sequential(nn.Sequential(nn.Linear(2, 2, rng=0), nn.Tanh()), nn.Linear(2, 2, rng=1))
    with pytest.raises(ValueError, match="module 0 is Recompute"):
        checkpoint.load(tmp_path / "c.npz", plain)
