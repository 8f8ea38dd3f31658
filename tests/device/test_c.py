"""The exported C program computes what the NumPy program computes, in exactly the bytes that were promised."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_nets import case

from lance_ref import device, models, nn, tune
from lance_ref import functional as F
from lance_ref.algebra.subspace import Subspace
from lance_ref.device.c.constants import dequantised, quantised
from lance_ref.device.c.expected import image_file
from lance_ref.device.c.folder import FILES
from lance_ref.device.layout import Choice, lay_out
from lance_ref.device.tiles import NotTiledError
from lance_ref.engine.tensor import Tensor
from lance_ref.nn.tracing import trace

LIBRARY = ("lance_step", "lance_layers", "lance_channels", "lance_planes", "lance_net", "lance_weights")
STRICT = ("-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Werror", "-Wconversion")
SANITIZERS = ("-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
WAYS = [("lance", "subspace", "factored"), ("lance", "subspace", "merged"), ("lance", "weight", "auto")]
WAYS += [(method, "weight", "auto") for method in ("bp", "bias", "head")]
LR = 0.02
STACK = 2048

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc is not installed (apt-get install gcc)")
needs_emulator = pytest.mark.skipif(
    shutil.which("arm-none-eabi-gcc") is None or shutil.which("qemu-system-arm") is None,
    reason="arm-none-eabi-gcc or qemu-system-arm is not installed "
    "(apt-get install gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm)",
)


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)


def build(folder: Path, main: str, *flags: str, cc: str = "gcc") -> None:
    sources = [f"{name}.c" for name in (*LIBRARY, "train", main)]
    done = run(folder, cc, *STRICT, *flags, *sources, "-lm", "-o", main)
    assert done.returncode == 0, done.stderr


def check(folder: Path, *flags: str, cc: str = "gcc") -> None:
    """Build the comparison and run it."""
    build(folder, "check", *flags, cc=cc)
    done = run(folder, "./check", "images.bin", "expected.txt")
    assert done.returncode == 0, done.stdout + done.stderr


def small(seed: int = 0, **options: Any) -> tuple[device.Program, np.ndarray, np.ndarray]:
    """A net with an inverted block, its images in bytes, and labels."""
    layers = [
        nn.Conv2d(3, 6, 3, 2, 1, rng=0), nn.ReLU6(), nn.Conv2d(6, 18, 1, rng=1), nn.ReLU6(),
        nn.Conv2d(18, 18, 3, 1, 1, groups=18, rng=2), nn.ReLU6(), nn.Conv2d(18, 6, 1, rng=3),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(6, 4, rng=4),
    ]  # fmt: skip
    net = nn.Sequential(*layers)
    rng = np.random.default_rng(seed)
    tuning = tune(net, "last:3")
    shapes = {r.path: r.inputs[0].shape for r in trace(net, (1, 3, 16, 16)) if r.op == "conv2d"}
    calibration = {p: Subspace.random(shapes[p], (None, 3, None, None), rng) for p in tuning.layers if p in shapes}
    program = device.compile(net, calibration, (3, 16, 16), **options)
    return program, rng.integers(0, 256, (8, 16, 16, 3)).astype(np.uint8), rng.integers(0, 4, 8)


# ---- the numbers are those of the NumPy program ------------------------------------------------


def random_export(seed: int, folder: Path) -> None:
    """A random net, exported; over the seeds with every method, form of the update, kind of image and of weights."""
    method, train, forward = WAYS[seed % 6]
    net, shape, calibration, x, y = case(seed, method, np.float32)
    if method == "lance" and not calibration:
        method, calibration = "head", None
    options: dict[str, Any] = {"method": method, "train": train, "forward": forward}
    options |= {"update": ("batch", "image")[seed // 6 % 2], "momentum": (0.0, 0.0, 0.5)[seed % 3]}
    program = device.compile(net, calibration, shape, **options)
    x, y = x[:2], y[:2]
    if seed % 2:
        C, H, W = shape
        x = np.random.default_rng(seed).integers(0, 256, (2, H, W, C)).astype(np.uint8)
    program.logits(x)  # from here on the program is laid out for this kind of image
    for tiled in range(len(program.layout.segments) - 1, 0, -1) if seed % 4 >= 2 else ():
        try:
            layout = lay_out(program.graph, program.recipe, Choice(program.layout.choice.heads, tiled, (2, 3)))
        except NotTiledError:
            continue
        layout.place()
        program._load(layout, None)
        break
    for _ in range(2):  # so that D is not zero
        program.step(x, y, 2 * LR)
    weights = "int8" if seed % 5 == 4 else "float32"
    exported = program.export_c(folder, weights, images=x, labels=y, lr=LR)
    assert exported.ram_bytes == program.ram_bytes


@needs_gcc
@pytest.mark.parametrize("seed", range(30))
def test_a_random_net(seed: int, tmp_path: Path) -> None:
    """Logits, losses and what was learned; dead arrays are NaN, so that reading one is a wrong number."""
    random_export(seed, tmp_path / "out")
    check(tmp_path / "out", "-O0", "-DLANCE_POISON")


@needs_gcc
@pytest.mark.parametrize("seed", [2, 3, 19])
def test_sanitizers_find_nothing(seed: int, tmp_path: Path) -> None:
    random_export(seed, tmp_path / "out")
    check(tmp_path / "out", *SANITIZERS)


@needs_gcc
def test_a_shortened_arena_is_caught(tmp_path: Path) -> None:
    """Planted: an arena that is four bytes too short. The export's number is not larger than what is needed."""
    program, images, labels = small()
    exported = program.export_c(tmp_path / "out", images=images, labels=labels, lr=LR)
    build(exported.folder, "check", *SANITIZERS, f"-DLANCE_ARENA_BYTES={exported.ram_bytes - 4}")
    done = run(exported.folder, "./check", "images.bin", "expected.txt")
    assert done.returncode != 0
    assert "global-buffer-overflow" in done.stderr


@needs_gcc
def test_a_wrong_number_is_found(tmp_path: Path) -> None:
    """Planted: one expected number is larger by a half of the largest."""
    program, images, labels = small()
    folder = program.export_c(tmp_path / "out", images=images, labels=labels, lr=LR).folder
    lines = (folder / "expected.txt").read_text().splitlines()
    lines[-1] = str(1.5 * float(lines[-1]) + 0.5)
    (folder / "expected.txt").write_text("\n".join(lines))
    build(folder, "check", "-O0")
    done = run(folder, "./check", "images.bin", "expected.txt")
    assert done.returncode == 1
    assert done.stdout.count("WRONG") == 1


def real_net(name: str, size: int, **options: Any) -> device.Program:
    net = models.create(name, num_classes=10, rng=0, **options)
    layers = tune(net, "last:4").layers
    shapes = {r.path: r.inputs[0].shape for r in trace(net, (1, 3, size, size)) if r.op == "conv2d"}
    rng = np.random.default_rng(0)
    calibration = {p: Subspace.random(shapes[p], (None, 8, None, None), rng) for p in layers if p in shapes}
    return device.compile(net, calibration, (3, size, size))


@needs_gcc
@pytest.mark.parametrize(
    ("name", "size", "options"), [("resnet8", 32, {}), ("mobilenetv2", 64, {"width": 0.35}), ("mcunet", 128, {})]
)
def test_a_net_that_people_use(name: str, size: int, options: dict[str, Any], tmp_path: Path) -> None:
    program = real_net(name, size, **options)
    image = np.random.default_rng(1).integers(0, 256, (1, size, size, 3)).astype(np.uint8)
    exported = program.export_c(tmp_path / "out", images=image, labels=np.array([3]), lr=0.001)
    assert exported.ram_bytes == program.ram_bytes
    check(exported.folder, "-O2")


@needs_gcc
def test_two_hundred_steps(tmp_path: Path) -> None:
    """The loss of every pass over the images, in NumPy and in C, to a thousandth."""
    program, images, labels = small()
    exported = program.export_c(tmp_path / "out", images=images, labels=labels, lr=0.05, passes=100, batch=4)
    build(exported.folder, "main_host", "-O2")
    done = run(exported.folder, "./main_host", "images.bin")
    assert done.returncode == 0, done.stderr
    got = [float(loss) for loss in re.findall(r"^pass \d+: loss (\S+)$", done.stdout, re.M)]
    want = []
    for _ in range(100):
        want.append(np.mean([program.step(images[i : i + 4], labels[i : i + 4], 0.05) for i in (0, 4)]))
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-4)
    assert got[-1] < 0.9 * got[0]


# ---- how it is written --------------------------------------------------------------------------


@pytest.mark.parametrize("cc", ["gcc", "clang"])
def test_compilers_warn_of_nothing(cc: str, tmp_path: Path) -> None:
    """Without optimisation and with; ``build`` makes warnings errors."""
    if shutil.which(cc) is None:
        pytest.skip(f"{cc} is not installed (apt-get install {cc})")
    for update, momentum in (("batch", 0.5), ("image", 0.0)):
        program, images, labels = small(update=update, momentum=momentum)
        folder = program.export_c(tmp_path / "out", images=images, labels=labels, lr=LR).folder
        check(folder, "-O3", cc=cc)
        build(folder, "main_host", "-O0", cc=cc)


@pytest.mark.skipif(shutil.which("clang-format") is None, reason="clang-format is not installed")
def test_the_c_files_are_formatted() -> None:
    files = sorted(str(path) for path in FILES.glob("*.[ch]"))
    done = subprocess.run(["clang-format", "--dry-run", "-Werror", *files], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[:2000]


def test_no_library_but_math(tmp_path: Path) -> None:
    """The step itself asks for no memory and no files."""
    for name in LIBRARY[:4]:
        text = (FILES / f"{name}.c").read_text(encoding="utf-8")
        assert set(re.findall(r"#include <(.+)>", text)) <= {"math.h"}
        assert not re.search(r"\b(malloc|calloc|realloc|free|alloca)\b", text)


# ---- bytes ---------------------------------------------------------------------------------------


@needs_emulator
@pytest.mark.parametrize("weights", ["float32", "int8"])
def test_bytes_and_losses_on_an_emulated_microcontroller(weights: str, tmp_path: Path) -> None:
    """RAM and flash of the library's objects as predicted, a stack below 2 KiB, and the losses of this computer."""
    program, images, labels = small()
    options: dict[str, Any] = {"images": images, "labels": labels, "lr": 0.1, "passes": 8, "batch": 4}
    exported = program.export_c(tmp_path / "out", weights, **options)
    folder = exported.folder
    built = run(folder, "make", "mps2")
    assert built.returncode == 0, built.stderr
    objects = [f"build/mps2/{name}.o" for name in LIBRARY]
    sizes = {
        Path(line.split()[-1]).stem: tuple(map(int, line.split()[:3]))
        for line in run(folder, "arm-none-eabi-size", *objects).stdout.splitlines()[1:]
    }
    assert sum(data + bss for _, data, bss in sizes.values()) == exported.ram_bytes
    pixels = 2 * 3 * 4  # scale and shift, in the file of the tables
    assert sizes["lance_weights"][0] == exported.flash_bytes - pixels
    symbols = run(folder, "arm-none-eabi-nm", "-S", "build/mps2/train.elf").stdout
    arena = re.search(r"^\S+ (\S+) \w lance_arena$", symbols, re.M)
    assert arena is not None
    assert int(arena[1], 16) == program.ram_bytes
    there = run(folder, "make", "run-mps2")
    assert there.returncode == 0, there.stdout + there.stderr
    stacks = [int(nbytes) for nbytes in re.findall(r"(\d+) bytes of stack", there.stdout)]
    assert len(stacks) == 3
    assert max(stacks) <= STACK
    build(folder, "main_host", "-O2")
    here = run(folder, "./main_host", "images.bin").stdout
    losses = re.findall(r"^pass .*$", there.stdout, re.M)
    assert losses == re.findall(r"^pass .*$", here, re.M)
    assert float(losses[-1].split()[-1]) < float(losses[0].split()[-1])


@needs_gcc
def test_the_state_is_what_was_learned(tmp_path: Path) -> None:
    """After a training in C, the block of ``lance_state`` has the arrays of the NumPy program, in their order."""
    program, images, labels = small()
    exported = program.export_c(tmp_path / "out", images=images, labels=labels, lr=0.05, passes=1, batch=8)
    build(exported.folder, "main_host", "-O0")
    run(exported.folder, "./main_host", "images.bin", "1", "8", "0.05", "state.bin")
    program.step(images, labels, 0.05)
    stored = (exported.folder / "state.bin").read_bytes()
    state = sorted((a for a in program.layout.arrays if a.is_state), key=lambda a: a.offset)
    assert len(stored) == exported.state_bytes == sum(a.nbytes for a in state)
    for array in state:
        part = np.frombuffer(stored[array.offset : array.offset + array.nbytes], array.dtype)
        np.testing.assert_allclose(part, program.value(array).ravel(), rtol=1e-4, atol=1e-6)


def test_int8_takes_a_quarter_and_changes_little(tmp_path: Path) -> None:
    program, images, labels = small()
    sizes = {
        w: program.export_c(tmp_path / w, w, images=images, labels=labels).flash_bytes for w in ("float32", "int8")
    }
    weights = sum(array.size for name, array in program.flash.items() if name.endswith(".weight"))
    outputs = sum(len(array) for name, array in program.flash.items() if name.endswith(".weight"))
    assert sizes["float32"] - sizes["int8"] == 3 * weights - 4 * outputs
    twin = program.with_weights(dequantised)
    assert np.abs(twin.logits(images) - program.logits(images)).max() < 0.05 * np.abs(program.logits(images)).max()


def test_codes_by_hand() -> None:
    codes, unit = quantised(np.array([[127.0, -63.4], [0.0, 0.0]], np.float32))
    assert codes.tolist() == [[127, -63], [0, 0]]
    assert unit.tolist() == [1.0, 1.0]
    np.testing.assert_array_equal(dequantised(np.float32([[2.54, -1.27]])), np.float32([[127, -64]]) * np.float32(0.02))


def test_images_by_hand() -> None:
    images = np.array([[[[1, 2]]], [[[3, 4]]]], np.uint8)
    assert image_file(images, np.array([5, 258])) == bytes([5, 0, 1, 2, 2, 1, 3, 4])


# ---- the folder ----------------------------------------------------------------------------------


def test_the_program_does_not_change(tmp_path: Path) -> None:
    """The expected numbers come from steps of a copy; what was learned before is what the C program starts with."""
    program, images, labels = small()
    program.step(images, labels, LR)
    before = program.weights()
    program.export_c(tmp_path / "out", images=images, labels=labels, lr=LR)
    after = program.weights()
    assert all(np.array_equal(before[name], after[name]) for name in before)
    assert "at the start" in (tmp_path / "out" / "lance_weights.c").read_text()


@needs_gcc
def test_an_export_goes_on_from_what_was_learned(tmp_path: Path) -> None:
    program, images, labels = small()
    program.step(images, labels, LR)
    program.export_c(tmp_path / "out", images=images, labels=labels, lr=LR)
    check(tmp_path / "out", "-O0")


def test_a_folder_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, _, _ = small()
    target = tmp_path / "out"
    program.export_c(target)
    (target / "build").mkdir()
    program.export_c(target, "int8")  # an earlier export is replaced
    assert not (target / "build").exists()
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    monkeypatch.setattr(Path, "write_bytes", lambda *_: (_ for _ in ()).throw(OSError("the disk is full")))
    with pytest.raises(OSError, match="disk is full"):
        program.export_c(target)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("arguments", "error", "words"),
    [
        ({"weights": "int4"}, ValueError, "weights is 'int4', expected one of float32, int8"),
        ({"passes": 0}, ValueError, "passes is 0, expected a positive integer"),
        ({"batch": True}, ValueError, "batch is True"),
        ({"lr": -1.0}, ValueError, "lr is -1.0"),
        ({"labels": [0]}, ValueError, "labels are given without images"),
        ({"images": np.zeros((1, 16, 16, 3), np.uint8)}, ValueError, "images are given without labels"),
        ({"images": np.zeros((1, 16, 16, 3), np.uint8), "labels": [4]}, ValueError, "expected 0 to 3"),
        ({"ram_section": 'a"b'}, ValueError, "ram_section is 'a\"b'"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: Any, words: str, tmp_path: Path) -> None:
    program, _, _ = small()
    with pytest.raises(error, match=re.escape(words)):
        program.export_c(tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_bad_folders(tmp_path: Path) -> None:
    program, _, _ = small()
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError, match="is a file, expected a folder"):
        program.export_c(tmp_path / "file")
    with pytest.raises(FileExistsError, match="has files that are no export"):
        program.export_c(tmp_path)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        program.export_c(tmp_path / "a" / "b")


def test_float64_is_refused(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 2, rng=0))
    net.to(np.float64)
    with pytest.raises(ValueError, match="computes in float64, expected float32"):
        device.compile(net, None, (4,)).export_c(tmp_path / "out")


@needs_gcc
def test_sections_of_the_linker(tmp_path: Path) -> None:
    program, images, labels = small()
    sections = {"ram_section": ".bss.dtcm", "flash_section": ".qspi"}
    program.export_c(tmp_path / "out", images=images, labels=labels, lr=LR, **sections)
    assert '__attribute__((section(".bss.dtcm")))' in (tmp_path / "out" / "lance_net.h").read_text()
    run(tmp_path / "out", "gcc", "-std=c99", "-c", "lance_weights.c")
    assert ".qspi" in run(tmp_path / "out", "objdump", "-h", "lance_weights.o").stdout


# ---- the functions that an application calls -----------------------------------------------------


def shared(folder: Path) -> ctypes.CDLL:
    """The library of an export, to be called from here."""
    sources = [f"{name}.c" for name in LIBRARY]
    done = run(folder, "gcc", *STRICT, "-O1", "-shared", "-fPIC", *sources, "-lm", "-o", "lance.so")
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(folder / "lance.so"))


def state_of(library: ctypes.CDLL) -> bytes:
    start, nbytes = ctypes.c_void_p(), ctypes.c_size_t()
    library.lance_state(ctypes.byref(start), ctypes.byref(nbytes))
    return ctypes.string_at(start.value or 0, nbytes.value)


@needs_gcc
def test_what_is_wrong_is_said_and_changes_nothing(tmp_path: Path) -> None:
    """A label that is none, a gradient that is not finite, and an image that is: three codes."""
    program, images, labels = small()
    exported = program.export_c(tmp_path / "out", images=images, labels=labels, lr=LR)
    library, loss = shared(exported.folder), ctypes.c_float()
    library.lance_reset()
    image = images[0].tobytes()  # outside of the arena, so that it is copied
    before = state_of(library)
    assert [library.lance_step(image, label, ctypes.byref(loss)) for label in (-1, 4)] == [1, 1]
    assert state_of(library) == before
    assert library.lance_step(image, 0, ctypes.byref(loss)) == 0
    assert loss.value == pytest.approx(program.step(images[:1], np.array([0]), 0.0), rel=1e-5)
    assert program.layout.update is not None
    _, gradient = program.layout.update.pairs[-1]
    arena = (ctypes.c_uint8 * exported.ram_bytes).in_dll(library, "lance_arena")
    numbers = np.frombuffer(arena, np.float32, 1, gradient.offset)
    before = state_of(library)
    numbers[0] = np.nan
    library.lance_update.argtypes = [ctypes.c_float]
    assert library.lance_update(0.1) == 2
    assert numbers[0] == 0
    assert state_of(library) == before


@needs_gcc
def test_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Linear(4, 3, rng=0))
    program = device.compile(net, None, (4,), update="image")
    library, loss = shared(program.export_c(tmp_path / "out").folder), ctypes.c_float()
    library.lance_reset()
    before = state_of(library)
    library.lance_step.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_float, ctypes.c_void_p]
    image = np.full(4, np.nan, np.float32).tobytes()
    assert library.lance_step(image, 0, 0.1, ctypes.byref(loss)) == 2
    assert state_of(library) == before


# ---- roles and sums that random nets seldom have -------------------------------------------------


class Preactivated(nn.Module):
    """x + f(relu(x)), and x once more: the map has three users, one of which must not change it."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(2, 4, 3, padding=1, rng=0)
        self.b, self.c = nn.Conv2d(4, 4, 3, padding=1, rng=1), nn.Conv2d(4, 4, 1, rng=2)
        self.hidden, self.head = nn.Linear(64, 6, rng=3), nn.Linear(6, 3, rng=4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x)
        y = x + self.b(F.relu(x))
        y = y + self.c(x)
        return self.head(F.hardswish(self.hidden(F.avg_pool2d(y, 2).reshape(y.shape[0], -1))))


@needs_gcc
@pytest.mark.parametrize("forward", ["factored", "merged"])
@pytest.mark.parametrize("is_head", [True, False])
def test_heads_and_tails(is_head: bool, forward: str, tmp_path: Path) -> None:
    """Every convolution as a head, or as a tail; all of them train in subspaces."""
    net, rng = Preactivated(), np.random.default_rng(0)
    tune(net, "all")
    inputs = {r.path: r.inputs[0].shape for r in trace(net, (1, 2, 8, 8)) if r.op in ("conv2d", "linear")}
    ranks = {path: (None, 1, *(None,) * (len(shape) - 2)) for path, shape in inputs.items()}
    calibration = {path: Subspace.random(inputs[path], ranks[path], rng) for path in inputs}
    program = device.compile(net, calibration, (2, 8, 8), forward=forward)
    images = rng.normal(size=(2, 2, 8, 8)).astype(np.float32)
    program.logits(images)
    choice = Choice(dict.fromkeys(program.layout.choice.heads, is_head))
    layout = lay_out(program.graph, program.recipe, choice)
    layout.place()
    program._load(layout, None)
    for _ in range(3):  # so that D is not zero
        program.step(images, np.array([0, 2]), 2 * LR)
    program.export_c(tmp_path / "out", images=images, labels=np.array([0, 2]), lr=LR)
    check(tmp_path / "out", "-O0", "-DLANCE_POISON")
