"""The conformance kit: the same bytes every time, read with suspicion, and passed by the library and by PyTorch."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import arrays, conv_geometries

from analysis.rules import tucker_costs
from lance_ref.algebra.geometry import ConvGeometry
from lance_ref.conformance import Kit, check, definitions, files, load_kit, make_kit, write_kit
from lance_ref.conformance.__main__ import main
from lance_ref.conformance.case import EXACT, FORMAT, FUNCTIONS, VERSION
from lance_ref.conformance.numpy_adapter import NumpyAdapter, adapter
from lance_ref.io.whole_file import sealed

ROOT = Path(__file__).parents[2]
DIGEST = "1d7df117511d86b92e75204f17851642e4bc04136a269676c52815b09b0556fe"
"""Of the kit's arrays and checks. If it changes without VERSION, kits of one version differ."""


@pytest.fixture(scope="module")
def kit() -> Kit:
    return make_kit()


@pytest.fixture(scope="module", autouse=True)
def no_disk() -> Iterator[None]:
    """Hundreds of small files need not reach the disk for a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("kit") / "cases"
    write_kit(folder)
    return folder


def statuses(outcomes: list[Any]) -> set[str]:
    return {one.status for one in outcomes}


def failure(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line that a wrong use says on stderr before it leaves with exit code 2."""
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith("python -m lance_ref.conformance: error: ")
    assert err.count("\n") == 1
    return err


# ---- what the kit holds ------------------------------------------------------------------------


def test_the_library_passes_everything(kit: Kit) -> None:
    """Every function through the library's own paths gives what the written-out sums give."""
    outcomes = check(adapter, kit)
    assert [f"{one.label}: {one.reason}" for one in outcomes if one.status != "passed"] == []
    assert {one.function for one in outcomes} == set(FUNCTIONS)


@pytest.mark.parametrize("order", ["papers", "separable"])
def test_both_orders_of_the_weight_gradient_pass(kit: Kit, order: str) -> None:
    """Not only the cheaper order, which alone runs by default, conforms."""
    ordered = NumpyAdapter()
    ordered.order = order
    outcomes = check(ordered, kit, "*/weight_gradient")
    assert len(outcomes) > 70
    assert statuses(outcomes) == {"passed"}


def test_pytorch_passes_what_its_example_implements(kit: Kit, monkeypatch: pytest.MonkeyPatch) -> None:
    """The example that users copy is right, and leaves functions out, which are skipped."""
    pytest.importorskip("torch")
    monkeypatch.syspath_prepend(str(ROOT))
    from examples import torch_adapter

    outcomes = check(torch_adapter.adapter, kit)
    assert [f"{one.label}: {one.reason}" for one in outcomes if one.status == "failed"] == []
    passed = {one.function for one in outcomes if one.status == "passed"}
    assert passed >= {"forward", "input_gradient", "bias_gradient", "project", "weight_gradient", "calibrate"}
    skipped = {one.function for one in outcomes if one.status == "skipped"}
    assert skipped == {*FUNCTIONS, "calibrate"} - (passed - {"calibrate"})


def test_macs_are_those_of_the_cost_model(kit: Kit) -> None:
    """The expected multiply-adds equal the formulas of analysis/, which share nothing with them."""
    seen = 0
    for case in kit.cases:
        for one in case.checks:
            if one.function not in ("projection_macs", "weight_gradient_macs"):
                continue
            given = files.resolve(case, one.arguments)
            ranks = [None if U is None else U.shape[1] for U in given["factors"]]
            if one.function == "projection_macs":
                expected = tucker_costs.projection_macs(given["activation"].shape, ranks, "separable")
            elif given["geometry"]["kind"] == "linear":
                g = given["geometry"]
                expected = tucker_costs.linear_weight_gradient_macs(g["input_shape"], g["weight_shape"][0], ranks)
            else:
                g = given["geometry"]
                C_out, _, k_h, k_w = g["weight_shape"]
                B, C_in, H, W = g["input_shape"]
                sizes = tucker_costs.ConvSizes(
                    B, C_in, (H, W), C_out, tuple(g["output_shape"][2:]), (k_h, k_w), g["groups"]
                )
                expected = tucker_costs.conv_weight_gradient_macs(sizes, ranks, given["order"])
            assert one.expected["value"] == expected, case.name
            seen += 1
    assert seen > 200


def test_full_rank_cases_expect_backpropagations_gradient(kit: Kit) -> None:
    """Where nothing is discarded the expected dW is that of the activation itself."""
    names = ("conv_full_rank", "conv_equal_sizes", "conv_nothing", "linear_equal_sizes", "linear_tokens_equal_sizes")
    for case in kit.cases:
        if case.name.removesuffix(".float64") in names:
            gradient = next(one for one in case.checks if one.function == "weight_gradient").arguments
            exact = definitions.weight_gradient(
                case.arrays["activation"], case.arrays["grad_output"], gradient["geometry"]
            )
            np.testing.assert_allclose(case.arrays["expected_weight_gradient"], exact, rtol=1e-12, atol=1e-12)


def test_every_geometry_is_there(kit: Kit) -> None:
    """Each option of a convolution occurs away from its default, and differently for height and width."""
    convs = [one.arguments["geometry"] for case in kit.cases for one in case.checks if one.function == "forward"]
    convs = [g for g in convs if g["kind"] == "conv"]
    for option in ("stride", "dilation"):
        assert any(g[option][0] > g[option][1] for g in convs) or any(g[option][0] < g[option][1] for g in convs)
    assert any(len({side for sides in g["padding"] for side in sides}) == 4 for g in convs)
    assert any(g["groups"] == g["input_shape"][1] > 1 for g in convs)
    assert any(1 < g["groups"] < g["input_shape"][1] for g in convs)
    assert any(g["weight_shape"][2:] == [1, 1] for g in convs)
    assert any(
        g["weight_shape"][2] != g["weight_shape"][3] and g["input_shape"][2] != g["input_shape"][3] for g in convs
    )


@given(g=conv_geometries(), seed=st.integers(0, 99))
def test_the_definitions_are_the_library_s_for_any_convolution(g: ConvGeometry, seed: int) -> None:
    """The sums written out and the fast paths agree beyond the geometries of the kit."""
    x, weight, grad_output = arrays(g, seed)
    geometry = {
        "kind": "conv",
        "input_shape": g.input_shape,
        "weight_shape": g.weight_shape,
        "output_shape": g.output_shape,
        "stride": g.stride,
        "padding": g.padding,
        "dilation": g.dilation,
        "groups": g.groups,
    }
    bias = np.zeros(len(weight))
    close: Callable[..., None] = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)  # noqa: E731
    close(definitions.forward(x, weight, bias, geometry), g.forward(x, weight))
    close(definitions.input_gradient(weight, grad_output, geometry), g.input_gradient(weight, grad_output))
    close(definitions.weight_gradient(x, grad_output, geometry), g.weight_gradient(x, grad_output))


@given(n=st.integers(1, 7), samples=st.integers(1, 9), seed=st.integers(0, 99))
def test_jacobi_diagonalises(n: int, samples: int, seed: int) -> None:
    """The kit's own eigenvectors are orthonormal and reproduce the matrix, deficient ones included."""
    R = np.random.default_rng(seed).standard_normal((n, samples))
    K = definitions.gram([R])
    energies, V = definitions.eigenbasis(K)
    assert (np.diff(energies) <= 0).all()
    np.testing.assert_allclose(V.T @ V, np.eye(n), atol=1e-13)
    np.testing.assert_allclose(V * energies @ V.T, K, atol=1e-12 * np.trace(K))


def test_a_cut_that_rounding_could_move_is_refused() -> None:
    """Two nearly equal energies, or a share that nearly is the threshold, would make a case without an answer."""
    definitions.check_clear_cut(np.array([4.0, 2.0, 1.0]), 2, 0.7)
    with pytest.raises(ValueError, match="no clear cut"):
        definitions.check_clear_cut(np.array([4.0, 2.0, 1.99]), 2, 0.7)
    with pytest.raises(ValueError, match="no clear cut"):
        definitions.check_clear_cut(np.array([4.0, 2.0, 1.0]), 2, 6 / 7 - 1e-4)


# ---- files ---------------------------------------------------------------------------------------


def test_contents_are_those_of_this_version(kit: Kit) -> None:
    """A case that changes, on this machine or on another, is noticed: raise VERSION then."""
    digest = hashlib.sha256()
    for case in kit.cases:
        for name, array in case.arrays.items():
            digest.update(f"{case.name} {name} {array.dtype.str} {array.shape}".encode() + array.tobytes())
        digest.update(json.dumps([[c.function, c.arguments, c.expected] for c in case.checks]).encode())
    assert digest.hexdigest() == DIGEST


def test_what_is_read_is_what_was_made(kit: Kit, written: Path) -> None:
    """Arrays bit by bit, checks and tolerances; NumPy reads the arrays without pickles."""
    loaded = load_kit(written)
    assert loaded.tolerances == kit.tolerances
    assert [case.checks for case in loaded.cases] == [case.checks for case in kit.cases]
    for ours, theirs in zip(kit.cases, loaded.cases, strict=True):
        assert (ours.name, ours.about, ours.dtype) == (theirs.name, theirs.about, theirs.dtype)
        with np.load(written / f"{ours.name}.npz", allow_pickle=False) as by_numpy:
            assert list(by_numpy) == list(ours.arrays) == list(theirs.arrays)
            for name, array in ours.arrays.items():
                assert array.dtype == theirs.arrays[name].dtype
                np.testing.assert_array_equal(array, theirs.arrays[name])
                np.testing.assert_array_equal(array, by_numpy[name])


def test_written_twice_is_the_same_bytes(written: Path, tmp_path: Path) -> None:
    """A second kit, also one over an earlier one, has the same files; nothing is left beside it."""
    expected = {path.name: path.read_bytes() for path in written.iterdir()}
    target = tmp_path / "kit"
    target.mkdir()  # an empty folder is fine
    for _ in range(2):
        write_kit(target)
        assert {path.name: path.read_bytes() for path in target.iterdir()} == expected
        assert [path.name for path in tmp_path.iterdir()] == ["kit"]


def test_an_interrupted_write_leaves_all_as_it_was(
    written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No half of a kit: a disk that fills up in the middle leaves the earlier kit, or nothing."""
    original, calls = files.save_npz, []

    def failing(path: Any, arrays: Any) -> None:
        calls.append(path)
        if len(calls) % 20 == 0:
            raise OSError("no space left on device")
        original(path, arrays)

    target = tmp_path / "kit"
    shutil.copytree(written, target)
    before = {path.name: path.read_bytes() for path in target.iterdir()}
    monkeypatch.setattr(files, "save_npz", failing)
    for folder in (target, tmp_path / "new"):
        with pytest.raises(OSError, match="no space left"):
            write_kit(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["kit"]
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before

    real, renames = files.os.rename, []

    def rename(source: Any, destination: Any) -> None:
        renames.append(source)
        if len(renames) == 2:
            raise OSError("device is gone")
        real(source, destination)

    monkeypatch.setattr(files, "save_npz", original)
    monkeypatch.setattr(files.os, "rename", rename)
    with pytest.raises(OSError, match="device is gone"):
        write_kit(target)
    assert [path.name for path in tmp_path.iterdir()] == ["kit"]
    assert {path.name: path.read_bytes() for path in target.iterdir()} == before


@pytest.mark.parametrize("content", ["a file", "notes.txt", "cases.json of something else", "kit and notes.txt"])
def test_a_folder_of_something_else_is_not_replaced(
    content: str, written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever --write did not make stays."""
    target = tmp_path / "mine"
    if content == "a file":
        target.write_text("mine")
    else:
        target.mkdir()
        if content.startswith("kit"):
            (target / "cases.json").write_bytes((written / "cases.json").read_bytes())
        elif content.startswith("cases.json"):
            (target / "cases.json").write_text('{"format": "mine", "cases": []}')
        if content.endswith("notes.txt"):
            (target / "notes.txt").write_text("mine")
    before = sorted(path.name for path in target.iterdir()) if target.is_dir() else []
    assert "expected a folder, new, empty, or of an earlier kit" in failure(capsys, "--write", str(target))
    assert (sorted(path.name for path in target.iterdir()) if target.is_dir() else []) == before


def spoil(folder: Path, change: Callable[[dict[str, Any]], Any], seal: bool = True) -> None:
    """Change the index, with a checksum that fits unless ``seal`` is False."""
    index = folder / "cases.json"
    document = json.loads(index.read_text(encoding="utf-8"))
    change(document)
    if seal:
        document = sealed(document)
    index.write_text(json.dumps(document), encoding="utf-8")


SPOILED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "format": (lambda d: d.update(format="x"), "expected an object with"),
    "version": (lambda d: d.update(version=2), '"version": 1'),
    "tolerance": (lambda d: d["tolerances"].update(float32=2), "a tolerance is 2"),
    "no tolerance": (lambda d: d.pop("tolerances"), "no entry 'tolerances'"),
    "outside": (lambda d: d["cases"][0].update(file="../x.npz"), "expected a name without a folder"),
    "missing": (lambda d: d["cases"][0].update(file="x.npz"), "x.npz: no such file"),
    "dtype": (lambda d: d["cases"][0].update(dtype="int8"), "has dtype 'int8'"),
    "function": (lambda d: d["cases"][0]["checks"][0].update(function="eval"), "has function 'eval'"),
    "array": (lambda d: d["cases"][0]["checks"][0]["arguments"].update(weight={"array": "no"}), "wrong entry: 'no'"),
    "kind": (lambda d: d["cases"][0]["checks"][0].update(expected={"kind": "x"}), "kind 'x'"),
    "type": (lambda d: d.update(cases=7), "not iterable"),
    "true version": (lambda d: d.update(version=True), '"version": 1'),
}


@pytest.mark.parametrize(
    "what",
    [*SPOILED, "unsealed", "another tolerance", "no checksum", "no json", "npz", "truncated", "empty", "no folder"],
)
def test_a_spoiled_kit_is_refused_in_one_line(
    what: str, written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing in a folder is believed: index, checksums, names and references are checked before anything runs."""
    folder = tmp_path / "kit"
    folder.mkdir()
    for path in written.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    message = SPOILED[what][1] if what in SPOILED else ""
    if what in SPOILED:
        spoil(folder, SPOILED[what][0])
    elif what == "unsealed":
        spoil(folder, lambda d: d["cases"][0]["checks"][5]["expected"].update(value=1), seal=False)
        message = "its checksum is not that of its contents"
    elif what == "another tolerance":
        spoil(folder, lambda d: d["tolerances"].update(float32=0.5), seal=False)
        message = "its checksum is not that of its contents"
    elif what == "no checksum":
        spoil(folder, lambda d: d.pop("sha256"), seal=False)
        message = "has no checksum"
    elif what == "no json":
        (folder / "cases.json").write_text("[" * 100_000)
        message = "cases.json: "
    elif what in ("npz", "truncated"):
        data = bytearray((folder / "linear.float32.npz").read_bytes())
        data[len(data) // 2] ^= 1
        (folder / "linear.float32.npz").write_bytes(data if what == "npz" else data[:-100])
        message = "linear.float32.npz: its SHA-256 is"
    else:
        folder = tmp_path / "other"
        if what == "empty":
            folder.mkdir()
        message = "expected a folder that --write made"
    assert message in failure(capsys, "--check", "lance_ref.conformance.numpy_adapter:adapter", str(folder))


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def adapters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], str]]:
    """Write a module of somebody's own; its name."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names = []

    def write(text: str) -> str:
        names.append(f"somebodys_adapter_{len(names)}")
        (tmp_path / f"{names[-1]}.py").write_text(text)
        return names[-1]

    yield write
    for name in names:
        sys.modules.pop(name, None)


def test_write_and_check_through_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The two commands of the documentation: exit code 0, and a table in which every count adds up."""
    target = str(tmp_path / "kit")
    assert main(["--write", target]) == 0
    assert f"checks to {target}" in capsys.readouterr().out
    assert main(["--check", "lance_ref.conformance.numpy_adapter:adapter", target]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines[2:-2]]
    total = sum(int(row[2]) for row in rows)
    assert lines[-1] == f"{total} passed, 0 failed, 0 skipped"
    for row in rows:
        assert (row[-1] == "exact") == (row[0] in EXACT)
        if row[-1] != "exact":
            assert float(row[-2]) <= float(row[-1])


def test_a_failed_check_is_listed_with_its_reason(
    adapters: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1, the case and how far it is off; a function that is missing is skipped, a misspelt one noted."""
    name = adapters(
        "def bias_gradient(grad_output, geometry):\n"
        "    axes = (0, 2, 3) if geometry['kind'] == 'conv' else tuple(range(grad_output.ndim - 1))\n"
        "    return grad_output.sum(axis=axes) * 1.001\n"
        "def weigth_gradient(): pass\n"
    )
    assert main(["--check", name, "--only", "linear.*"]) == 1
    out = capsys.readouterr().out
    assert "FAILED linear.float64/bias_gradient: relative error 0.001 at [" in out
    assert "expected at most 1e-12" in out
    assert "note: 'weigth_gradient' is no function of the kit, is 'weight_gradient' meant?" in out
    assert out.count("FAILED") == 2
    assert "0 passed, 2 failed, 14 skipped" in out


def test_every_check_can_be_listed(capsys: pytest.CaptureFixture[str]) -> None:
    """--verbose names each check of those that --only selects."""
    assert main(["--check", "lance_ref.conformance.numpy_adapter", "--only", "rank*", "--verbose"]) == 0
    out = capsys.readouterr().out
    assert "passed   rank_reached.float64/energy_rank  equal" in out
    assert out.count("/energy_rank") == 5


def test_nothing_that_ran_is_no_pass(adapters: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    """An adapter that declines every case does not exit with 0, and what it says is shown."""
    name = adapters("def metrics(**arguments):\n    raise NotImplementedError('not\\nyet')\n")
    assert main(["--check", name, "--only", "metrics*", "--verbose"]) == 1
    out = capsys.readouterr().out
    assert "skipped  metrics_2_tasks.float64/metrics  not yet" in out
    assert "0 passed, 0 failed, 3 skipped" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "one of the arguments --write --check is required"),
        (("--write", "a", "--check", "b"), "not allowed with"),
        (("--write", "no/such/folder"), "there is no folder"),
        (("--write", "a", "b"), "--write takes one folder"),
        (("--write", "a", "--verbose"), "--write takes one folder"),
        (("--check", "no_such_module:x"), "cannot be imported: ModuleNotFoundError"),
        (("--check", ":x"), "expected pkg.module:adapter"),
        (("--check", "math:"), "expected pkg.module:adapter"),
        (("--check", "math:x"), "cannot be imported: AttributeError"),
        (("--check", "math"), "has none of the functions forward, "),
        (("--check", "lance_ref.conformance.numpy_adapter", "--only", "nothing*"), "which no case matches"),
    ],
)
def test_wrong_usage_is_one_line(
    arguments: tuple[str, ...],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Exit code 2 and one line that says what was expected; no traceback, and nothing written."""
    monkeypatch.chdir(tmp_path)
    assert message in failure(capsys, *arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["raise SystemExit(3)", "def broken(:", "1 / 0", "class A:\n    forward = 1\n"])
def test_an_adapter_that_cannot_be_imported_is_one_line(
    text: str, adapters: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever somebody's module does when it is imported is wrong usage, not a crash of ours."""
    assert f"adapter '{adapters(text)}:A' " in failure(capsys, "--check", "somebodys_adapter_0:A")


def test_a_class_is_an_adapter(adapters: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    """pkg.module:Class is called without arguments first."""
    name = adapters("class A:\n    def saved_bytes(self, activation, factors):\n        return 4\n")
    assert main(["--check", f"{name}:A", "--only", "linear.float32/saved_bytes"]) == 1
    assert f"returned 4, expected {4 * math.prod((3, 2))}" in capsys.readouterr().out


# ---- the documentation ---------------------------------------------------------------------------


def documentation() -> str:
    return (ROOT / "docs" / "conformance.md").read_text(encoding="utf-8")


def test_the_documentation_specifies_every_function() -> None:
    """Names and parameters are those that an adapter is called with."""
    stated = dict(re.findall(r"^\| `(\w+)\((.*?)\)` \|", documentation(), flags=re.M))
    ours = {name: ", ".join(inspect.signature(getattr(adapter, name)).parameters) for name in FUNCTIONS}
    assert stated == ours


def test_calls_have_the_documented_parameters(kit: Kit) -> None:
    """Each check of the kit names exactly the parameters of its function."""
    for case in kit.cases:
        for one in case.checks:
            assert list(one.arguments) == list(inspect.signature(getattr(adapter, one.function)).parameters), case.name


def test_the_documented_adapter_passes(
    adapters: Callable[[str], str], capsys: pytest.CaptureFixture[str], kit: Kit
) -> None:
    """The example of the documentation runs as it stands, and declines what it says it declines."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", documentation(), flags=re.M | re.S)
    assert main(["--check", adapters(code)]) == 0
    lines = capsys.readouterr().out.splitlines()
    convs = sum(case.name.startswith("conv") for case in kit.cases)
    linears = sum(case.name.startswith("linear") for case in kit.cases)
    rows = {(row[0], row[1]): row[2:5] for row in map(str.split, lines[2:-2])}
    assert rows["bias_gradient", "float32"] == [str(linears // 2), "0", str(convs // 2)]
    assert rows["project", "float64"][:2] == [str((convs + linears) // 2), "0"]


def test_documented_tolerances_and_version_are_todays(kit: Kit) -> None:
    """The numbers that the documentation states are those of the kit."""
    text = documentation()
    assert kit.tolerances == {"float32": 2e-5, "float64": 1e-12}
    assert "2·10⁻⁵ in float32 and 10⁻¹² in float64" in text
    assert f'`format` ("{FORMAT}"), `version` ({VERSION})' in text
