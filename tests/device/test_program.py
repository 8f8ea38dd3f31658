"""A program computes what the library computes, inside of its arena."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from device_nets import RandomGraph, Residual, case, library_step, random_calibration, random_net
from hypothesis import given, settings
from hypothesis import strategies as st

from lance_ref import device, models, nn, tune
from lance_ref import functional as F
from lance_ref.algebra.subspace import Subspace
from lance_ref.device.instructions import draw
from lance_ref.device.layout import Choice, lay_out
from lance_ref.device.tiles import NotTiledError
from lance_ref.engine.tensor import Tensor
from lance_ref.optim import SGD

LR = 0.1
WAYS = [("lance", "subspace", "factored"), ("lance", "subspace", "merged"), ("lance", "weight", "auto")]
WAYS += [(method, "weight", "auto") for method in ("bp", "bias", "head")]


def differ(got: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> float:
    """The largest difference, relative to the largest number of its array."""
    assert set(got) == set(want)
    return max(float(np.abs(got[n] - want[n]).max() / max(1e-9, np.abs(want[n]).max())) for n in want)


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from(WAYS))
def test_a_step_is_the_librarys(seed: int, way: tuple[str, str, str]) -> None:
    """Loss and weights after a step, in float64, with dead arrays poisoned; any geometry and any modes."""
    method, train, forward = way
    net, shape, calibration, x, y = case(seed, method)
    if method == "lance" and not calibration:
        method, calibration = "head", None
    program = device.compile(net, calibration, shape, method=method, train=train, forward=forward, poison=True)
    loss = program.step(x, y, LR)
    want_loss, want = library_step(net, calibration, x, y, LR)
    assert loss == pytest.approx(want_loss, rel=1e-10)
    assert differ(program.weights(), want) < 1e-10
    assert program.lower_bound_bytes <= program.ram_bytes <= 1.05 * program.lower_bound_bytes


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.sampled_from(["all", "last:1", "last:2", "head"]), st.booleans())
def test_any_graph_of_maps(seed: int, selection: str, is_compressed: bool) -> None:
    """Maps that several operations use, that are added to themselves, or that nothing uses: as in the library."""
    net, shape, rng = RandomGraph(seed), (2, 5, 6), np.random.default_rng(seed)
    net.to(np.float64)
    try:
        layers = tune(net, selection).layers
    except ValueError:  # fewer layers
        layers = tune(net, "head").layers
    x, y = rng.normal(size=(2, *shape)), rng.integers(0, 3, 2)
    calibration = random_calibration(net, shape, layers, rng, 2) if is_compressed else {}
    program = device.compile(net, calibration or None, shape, poison=True)
    loss = program.step(x, y, LR)
    want_loss, want = library_step(net, calibration, x, y, LR)
    got = program.weights()
    assert loss == pytest.approx(want_loss, rel=1e-10)
    assert differ({name: got[name] for name in want}, want) < 1e-10


@settings(max_examples=15)
@given(st.integers(0, 10_000), st.sampled_from(WAYS), st.sampled_from(["image", "batch"]), st.sampled_from([0.0, 0.5]))
def test_many_steps_are_the_librarys(seed: int, way: tuple[str, str, str], update: str, momentum: float) -> None:
    """Updates after every image or after a batch, with momentum or without, over several steps."""
    method, train, forward = way
    net, shape, calibration, x, y = case(seed, method)
    if method == "lance" and not calibration:
        method, calibration = "head", None
    options: dict[str, Any] = {"method": method, "train": train, "forward": forward, "momentum": momentum}
    program = device.compile(net, calibration, shape, update=update, poison=True, **options)
    for _ in range(3):
        program.step(x, y, LR / 4)
    library_step(net, calibration, x, y, 0.0)  # puts the stores in place
    optimiser = SGD([p for p in net.parameters() if p.requires_grad], lr=LR / 4, momentum=momentum)
    for _ in range(3):
        for part in [slice(0, 3)] if update == "batch" else [slice(i, i + 1) for i in range(3)]:
            optimiser.zero_grad()
            F.cross_entropy(net(Tensor(x[part])), y[part]).backward()
            optimiser.step()
    want = {name: p.data for name, p in net.named_parameters() if p.requires_grad and name in program.weights()}
    assert differ(program.weights(), want) < 1e-8


@settings(max_examples=25)
@given(st.integers(0, 10_000), st.integers(1, 5), st.integers(1, 5))
def test_tiles_change_nothing(seed: int, h: int, w: int) -> None:
    """Any number of segments in tiles of any size gives the logits of the whole maps."""
    net, shape = random_net(seed)
    net.to(np.float64)
    tune(net, "head")
    program = device.compile(net, None, shape, method="head", poison=True)
    x = np.random.default_rng(seed).normal(size=(1, *shape))
    program.logits(x)  # from here on the image is floats
    net.eval()
    want = net(Tensor(x)).data
    for count in range(1, len(program.layout.segments)):
        try:
            layout = lay_out(program.graph, program.recipe, Choice(program.layout.choice.heads, count, (h, w)))
        except NotTiledError:
            break
        layout.place()
        program._load(layout, None)
        np.testing.assert_allclose(program.logits(x), want, rtol=1e-9, atol=1e-12)


def small(**options: Any) -> tuple[nn.Module, device.Program]:
    block = nn.Sequential(
        nn.Conv2d(8, 16, 1, rng=1), nn.ReLU6(), nn.Conv2d(16, 16, 3, 1, 1, groups=16, rng=2), nn.ReLU6(),
        nn.Conv2d(16, 8, 1, rng=3),
    )  # fmt: skip
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1, rng=0), nn.ReLU6(), Residual(block),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4, rng=4),
    )  # fmt: skip
    tuning = tune(net, "last:3")
    calibration = random_calibration(net, (3, 16, 16), tuning.layers, np.random.default_rng(1), 2)
    return net, device.compile(net, calibration, (3, 16, 16), **options)


def batch(dtype: Any = np.uint8, n: int = 4) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (n, 16, 16, 3)).astype(np.uint8)
    x = pixels if dtype == np.uint8 else (pixels / 255).astype(dtype).transpose(0, 3, 1, 2)
    return x, rng.integers(0, 4, n)


def test_pixels_are_their_preprocessed_floats() -> None:
    """Bytes give the step of the floats that they stand for; going from one to the other keeps what was trained."""
    _, program = small()
    _, other = small()
    (pixels, y), (floats, _) = batch(), batch(np.float32)
    for _ in range(2):
        assert program.step(pixels, y, LR) == pytest.approx(other.step(floats, y, LR), rel=1e-5)
    assert differ(program.weights(), other.weights()) < 1e-5
    assert (other.layout.image.nbytes, program.layout.image.nbytes) == (3072, 768)
    before = other.weights()
    other.logits(pixels)
    assert differ(other.weights(), before) == 0


def test_the_output_is_written_over_the_image() -> None:
    """With tiles, rows of the image that no later tile reads make room: less than both together, the same logits."""
    layers = [nn.Conv2d(3, 12, 5, 4, 2, rng=0), nn.ReLU(), nn.Conv2d(12, 12, 1, rng=1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4, rng=2))
    tune(net, "head")
    program = device.compile(net, None, (3, 64, 64), method="head", poison=True)
    pixels = np.random.default_rng(0).integers(0, 256, (1, 64, 64, 3)).astype(np.uint8)
    layout = lay_out(program.graph, program.recipe, Choice(program.layout.choice.heads, 1, (2, 3)))
    layout.place()
    program._load(layout, None)
    image = layout.image
    assert image.over is not None
    assert image.over.offset == image.offset
    assert image.nbytes < 64 * 64 * 3 + image.over.nbytes
    net.eval()
    want = net(Tensor((pixels / 255).astype(np.float32).transpose(0, 3, 1, 2))).data
    np.testing.assert_allclose(program.logits(pixels), want, rtol=1e-4, atol=1e-5)


def test_float32_is_near() -> None:
    net, shape, calibration, x, y = case(3, "lance", np.float32)
    program = device.compile(net, calibration, shape)
    program.step(x, y, LR)
    assert differ(program.weights(), library_step(net, calibration, x, y, LR)[1]) < 1e-5


def test_it_learns() -> None:
    _, program = small(update="image")
    x, y = batch()
    first = program.step(x, y, 0.3)
    for _ in range(100):
        last = program.step(x, y, 0.3)
    assert last < 0.7 * first
    assert program.evaluate(x, y) == (program.predict(x) == y).mean() >= 0.5


def test_weights_go_into_a_net() -> None:
    net, program = small()
    x, y = batch(np.float32)
    program.step(x, y, LR)
    program.load_into(net)
    net.eval()
    np.testing.assert_allclose(net(Tensor(x)).data, program.logits(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"'2\.body\.0\.weight' of the net has shape None, expected \(16, 8, 1, 1\)"):
        program.load_into(nn.Sequential(nn.Linear(2, 2, rng=0)))


def test_a_program_keeps_its_weights() -> None:
    """Numbers of the net that are overwritten later are not those of a program compiled before."""
    net, program = small()
    x, _ = batch()
    before = program.logits(x)
    net[0].weight.data[...] = 0
    np.testing.assert_array_equal(program.logits(x), before)


def test_a_linear_layer_of_one_output_behind_one_channel() -> None:
    """It is no depthwise convolution, though one output looks at one channel: it keeps a core and trains D."""
    layers = [nn.Conv2d(1, 1, 3, rng=0), nn.ReLU(), nn.Flatten(), nn.Linear(16, 1, rng=1), nn.Linear(1, 3, rng=2)]
    net = nn.Sequential(*layers).to(np.float64)
    tune(net, "all")
    rng = np.random.default_rng(0)
    calibration = {"3": Subspace.random((2, 16), (None, 3), rng)}
    program = device.compile(net, calibration, (1, 6, 6), poison=True)
    x, y = rng.normal(size=(2, 1, 6, 6)), np.array([0, 1])
    program.step(x, y, LR)
    assert differ(program.weights(), library_step(net, calibration, x, y, LR)[1]) < 1e-10


def test_an_overlap_is_a_wrong_number() -> None:
    """Planted: an array that is moved onto another which is alive gives other weights."""
    _, program = small()
    _, moved = small()
    arrays = {array.name: array for array in moved.layout.arrays}
    maps = [a for a in arrays.values() if a.kind == "maps"]
    a, b = next((a, b) for a in maps for b in maps if a is not b and a.meets(b))
    a.offset = b.offset
    x, y = batch()
    program.step(x, y, LR)
    with np.errstate(all="ignore"):
        try:
            moved.step(x, y, LR)
        except FloatingPointError:
            return
    assert differ(moved.weights(), program.weights()) > 1e-4


def test_poison_shows_what_is_read_too_late() -> None:
    """Planted: an array that is said to die early is NaN when it is read."""
    net, _ = small()
    tune(net, "last:3")
    _, program = small(poison=True)
    core = next(array for array in program.layout.arrays if array.kind == "cores")
    program._ends[core.first] = [*program._ends.get(core.first, []), core]
    x, y = batch()
    with pytest.raises(FloatingPointError, match=r"nothing was changed"):
        program.step(x, y, LR)


@pytest.mark.parametrize("update", ["image", "batch"])
def test_a_step_that_fails_changes_nothing(update: str) -> None:
    _, program = small(update=update, momentum=0.5)
    x, y = batch(np.float32)
    program.step(x, y, LR)
    before, memory = program.weights(), program.gradients()
    with pytest.raises(FloatingPointError, match="nothing was changed"):
        program.step(x, y, 1e300)
    assert differ(program.weights(), before) == 0
    assert differ(program.gradients(), memory) == 0


def test_dropout_keeps_what_its_numbers_say() -> None:
    """A step equals that of a net in which dropout's mask is a constant; predictions use no mask."""

    class Masked(nn.Module):
        mask: np.ndarray

        def forward(self, x: Tensor) -> Tensor:
            return x * Tensor(self.mask)

    masked = Masked()
    layers = [nn.Linear(6, 8, rng=0), nn.ReLU(), nn.Dropout(0.4), nn.Linear(8, 3, rng=1)]
    net = nn.Sequential(*layers)
    tune(net, "all")
    program = device.compile(net, None, (6,), poison=True)
    x, y = np.random.default_rng(0).normal(size=(1, 6)).astype(np.float32), np.array([1])
    plain = program.logits(x)
    kept = np.array([draw(np.zeros(1, np.uint32) + np.uint32(c), 1, 0.4)[0] for c in range(8)])
    assert 0 < kept.sum() < 8
    masked.mask = (kept / 0.6).astype(np.float32)[None]
    twin = nn.Sequential(layers[0], layers[1], masked, layers[3])
    want_loss, want = library_step(twin, None, x, y, LR)
    assert program.step(x, y, LR) == pytest.approx(want_loss, rel=1e-5)
    assert differ(program.weights(), want) < 1e-5
    net.eval()
    np.testing.assert_allclose(plain, net(Tensor(x)).data, rtol=1e-5)
    assert abs(draw(np.zeros(1, np.uint32), 100_000, 0.3).mean() - 0.7) < 0.01


def test_every_byte_is_inside_of_the_arena() -> None:
    """Arrays lie within the arena, aligned, and no two that are alive at the same time overlap."""
    _, program = small()
    arrays = program.layout.arrays
    over = {array.over for array in arrays}
    for i, a in enumerate(arrays):
        assert 0 <= a.offset <= a.offset + a.nbytes <= program.ram_bytes
        assert (a.offset + a.lead) % a.dtype.itemsize == 0
        for b in arrays[:i]:
            if a.meets(b) and a not in over and b not in over:
                assert a.offset + a.nbytes <= b.offset or b.offset + b.nbytes <= a.offset, (a.name, b.name)


def test_what_was_learned_lies_together() -> None:
    """From the first byte on, without a gap: an application can store it as one block."""
    _, program = small(momentum=0.9)
    state = sorted((a for a in program.layout.arrays if a.is_state), key=lambda a: a.offset)
    assert {a.name for a in state} >= {"5.weight", "5.bias", "2.body.2.weight"}
    assert not any(a.name.startswith("gradient") for a in state)
    assert [a.offset for a in state] == [sum(b.nbytes for b in state[:i]) for i in range(len(state))]


def test_a_budget_takes_the_fewest_multiply_adds() -> None:
    """A larger budget never recomputes more; one that is too small says what is needed and what stands in the way."""
    net = models.create("mcunet", num_classes=4, rng=0)
    tune(net, "head")
    sizes = [device.compile(net, None, (3, 64, 64), method="head", budget=b) for b in ("200KiB", "60KiB", "45KiB")]
    recomputed = [program.layout.recomputed_macs for program in sizes]
    assert recomputed == sorted(recomputed)
    assert recomputed[-1] > 0
    assert all(p.budget is not None and p.ram_bytes <= p.budget for p in sizes)
    with pytest.raises(device.BudgetError, match=r"budget is 2\.0 KiB, but the step needs at least .* KiB, of which"):
        device.compile(net, None, (3, 64, 64), method="head", budget=2048)


@pytest.mark.parametrize(
    ("images", "labels", "lr", "error", "words"),
    [
        (np.zeros((2, 16, 16, 3), np.int32), [0, 1], 0.1, TypeError, "dtype int32, expected uint8"),
        (
            np.zeros((2, 3, 16, 16), np.uint8),
            [0, 1],
            0.1,
            ValueError,
            r"shape \(2, 3, 16, 16\).*expected \(B, 16, 16, 3\)",
        ),
        (np.full((1, 3, 16, 16), np.nan, np.float32), [0], 0.1, ValueError, "NaN or infinity"),
        (np.zeros((0, 16, 16, 3), np.uint8), [], 0.1, ValueError, "expected"),
        (np.zeros((2, 16, 16, 3), np.uint8), [0], 0.1, ValueError, "expected 2 integers"),
        (np.zeros((1, 16, 16, 3), np.uint8), [4], 0.1, ValueError, "expected 0 to 3"),
        (np.zeros((1, 16, 16, 3), np.uint8), [0], -1, ValueError, "lr is -1"),
        (np.zeros((1, 16, 16, 3), np.uint8), [0], np.inf, ValueError, "lr is inf"),
    ],
)
def test_bad_images_labels_and_rates(images: Any, labels: Any, lr: Any, error: Any, words: str) -> None:
    _, program = small()
    before = program.weights()
    with pytest.raises(error, match=words):
        program.step(images, np.asarray(labels, int), lr)
    assert differ(program.weights(), before) == 0


def test_what_is_printed_and_drawn(tmp_path: Any) -> None:
    _, program = small()
    text = str(program)
    assert "<- peak" in text
    assert f"{program.ram_bytes:,}" in text
    assert all(len(line) <= 92 for line in text.splitlines())
    program.plot(tmp_path / "arena.png")
    assert (tmp_path / "arena.png").stat().st_size > 10_000
    described = program.describe()
    assert max(a["offset"] + a["bytes"] for a in described["arena"]) == described["ram_bytes"]
    assert sum(described["ram"].values()) == described["lower_bound_bytes"]
