"""Files that come with the package are found wherever the command runs; one that is missing is an error."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from analysis import cost
from analysis.commands import shipped
from analysis.ranks import choose as ranks
from experiments.command import COMMANDS
from experiments.command import main as lance_ref_main
from experiments.ledger import claims, published
from experiments.ledger.evidence import NOT_RUN
from lance_ref.datasets import digits
from lance_ref.io.whole_file import read_json

ROOT = Path(__file__).parents[2]
RESULTS = sorted((ROOT / "experiments" / "results").glob("*.json"))
CASE = ["--net", "mobilenetv2", "--format", "json"]


def run(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A process in a folder, with the packages as they are installed, or else in the path."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=kept | environment, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module", name="installed")
def _installed(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Skips where the packages are only found through the current folder."""
    found = run(tmp_path_factory.mktemp("elsewhere"), "-c", "import analysis")
    if found.returncode:
        pytest.skip("the package is not installed")


# ---- in the way ------------------------------------------------------------------------------


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("names", "start"),
    [
        (["analysis"], ["analysis.cost_model"]),
        (["lance_ref"], ["analysis.cost_model"]),
        (["analysis", "analysis/data", "lance_ref", "lance_ref/datasets"], ["analysis.cost_model"]),
        (["analysis", "analysis/data", "lance_ref", "lance_ref/datasets"], ["experiments.command", "cost"]),
    ],
)
def test_empty_folders_change_nothing(tmp_path: Path, names: list[str], start: list[str]) -> None:
    """MobileNetV2 reads 1060.95x of the papers' count, in whatever folder."""
    for name in names:
        (tmp_path / name).mkdir()
    done = run(tmp_path, "-m", *start, *CASE)
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    assert document["ranks_from"].startswith("spectra shipped as analysis/data/mobilenetv2_224.json")
    totals = {method: of["activation_bytes"]["paper"] for method, of in document["totals"].items()}
    assert f"{totals['bp'] / totals['lance']:.2f}" == "1060.95"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["analysis/__init__.py", "lance_ref/__init__.py", "lance_ref.py", "analysis.py"])
def test_what_is_in_the_way_is_an_error(tmp_path: Path, name: str) -> None:
    """A package or module of the same name: never a result; where our code runs at all, the file is named."""
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    done = run(tmp_path, "-m", "analysis.cost_model", *CASE)
    assert done.returncode != 0
    assert not done.stdout
    if name == "analysis.py":
        assert "analysis" in done.stderr  # Python's own words: nothing of ours is found
    elif "analysis.cost_model: error" in done.stderr:
        assert f"{tmp_path / name} is in the way" in done.stderr
        assert done.stderr.count("\n") == 1


@pytest.mark.usefixtures("installed")
def test_modules_of_a_namesake_are_not_mixed_with_ours(tmp_path: Path) -> None:
    """A folder ``analysis`` with a ``report.py`` of the reader's own is passed over, too."""
    (tmp_path / "analysis").mkdir()
    (tmp_path / "analysis" / "report.py").write_text("raise SystemExit('not ours')")
    done = run(tmp_path, "-m", "analysis.cost_model", *CASE)
    assert done.returncode == 0, done.stderr
    assert "mobilenetv2_224.json" in json.loads(done.stdout)["ranks_from"]


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize("name", ["analysis.py", "lance_ref.py"])
def test_the_console_script_does_not_look_into_the_working_directory(tmp_path: Path, name: str) -> None:
    """``lance-ref`` as installed: files of the folder in which it runs are no modules."""
    script = Path(sys.executable).with_name("lance-ref")
    if not script.exists():
        pytest.skip("the console script is not installed")
    (tmp_path / name).write_text("raise SystemExit('not ours')")
    done = subprocess.run([script, "cost", *CASE], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["net"] == "mobilenetv2"


def test_a_module_from_elsewhere_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """In the same process: a module whose file is in another folder."""
    spec = importlib.util.spec_from_file_location("analysis.elsewhere", tmp_path / "elsewhere.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    shipped.check_own_packages()
    monkeypatch.setitem(sys.modules, "analysis.elsewhere", module)
    with pytest.raises(ImportError, match=r"elsewhere\.py is in the way: Python takes it for analysis\.elsewhere"):
        shipped.check_own_packages()


# ---- missing ---------------------------------------------------------------------------------


def _spectra() -> object:
    return ranks.choose_ranks({"a": (128, 3)}, "mobilenetv2", (3, 224, 224), 0.7, None, None)


MISSING: dict[str, tuple[Callable[[], object], str]] = {
    "spectra": (_spectra, "mobilenetv2_224.json"),
    "spectra of another net": (lambda: ranks.shipped_spectra("mcunet", (3, 128, 128)), "mcunet_128.json"),
    "published figures": (published.published.__wrapped__, "published.yaml"),
    "claims": (claims.ledger.__wrapped__, "claims.yaml"),
}


@pytest.mark.parametrize("name", MISSING)
def test_a_shipped_file_that_is_missing_is_an_error(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It names the file; no other ranks, no empty list."""
    read, file = MISSING[name]
    monkeypatch.setattr(shipped, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"{file} is missing, which is a part of the package lance-ref"):
        read()


def test_missing_spectra_stop_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also through ``cost``; a net that never had any assumes a quarter, as ever."""
    monkeypatch.setattr(shipped, "ROOT", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"mcunet_128\.json"):
        cost("mcunet", batch=3, num_classes=7, epsilon=0.6543)
    assert cost("mcunet", batch=3, image_size=64, epsilon=0.6543).ranks_from.startswith("assumed: a quarter")


def test_missing_digits_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bundled digits."""
    monkeypatch.setattr(digits, "__file__", str(tmp_path / "digits.py"))
    with pytest.raises(OSError, match=r"digits\.npz"):
        digits.load_digits()


def test_every_file_of_the_list_is_there() -> None:
    """And nothing else that looks like spectra."""
    names = set(ranks.SHIPPED.values())
    data = ROOT / "analysis" / "data"
    assert {path.name for path in data.glob("*.json")} == names | {"measured.json"}
    for (net, shape), name in ranks.SHIPPED.items():
        assert ranks.shipped_spectra(net, shape) == data / name
        assert ranks.shipped_spectra(net, (1, *shape[1:])) is None
        assert ranks.shipped_spectra(net, (3, 8, 8)) is None


# ---- one name for all commands ---------------------------------------------------------------


PROGRAM = r'(?:prog="python -m |frame\.parser\(")([\w.]+)"'
"""How a module says which command it is."""


def test_every_command_has_a_name(capsys: pytest.CaptureFixture[str]) -> None:
    """Every module that is run with ``python -m`` and has options; ``--help`` lists them."""
    files = [path for name in ("analysis", "experiments") for path in (ROOT / name).rglob("*.py")]
    modules = {name for path in files for name in re.findall(PROGRAM, path.read_text())}
    assert len(modules) > 10
    assert modules <= {module.removesuffix(".command") for module, _ in COMMANDS.values()}
    assert lance_ref_main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, (module, about) in COMMANDS.items():
        assert importlib.util.find_spec(module) is not None
        assert any(line.split()[:1] == [name] and line.endswith(about) for line in out.splitlines())


def test_a_command_does_what_its_module_does(capsys: pytest.CaptureFixture[str]) -> None:
    """The same output, the same options."""
    from experiments.ledger.explain import main

    assert main(["--claim", "mobilenetv2-last2"]) == 0
    alone = capsys.readouterr().out
    assert lance_ref_main(["explain", "--claim", "mobilenetv2-last2"]) == 0
    assert capsys.readouterr().out == alone


@pytest.mark.parametrize(("given", "said"), [([], "no command"), (["costs"], "unknown command 'costs'")])
def test_no_such_command(given: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line with the names, exit code 2."""
    with pytest.raises(SystemExit) as left:
        lance_ref_main(given)
    assert left.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"lance-ref: error: {said}, expected one of cost, plan, ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("lance-ref ", {"cost", "plan", "finetune"}),
        ("lance-ref pl", {"plan"}),
        ("lance-ref cost --ne", {"--net"}),
        ("lance-ref cost --net mobilenetv3", {"mobilenetv3-small"}),
        ("lance-ref plan --method lance-", {"lance-center", "lance-mean-free"}),
        ("lance-ref  cost --net mlp --dtype ", {"float32", "float64"}),
    ],
)
def test_the_shell_is_told_what_may_follow(line: str, offered: set[str], tmp_path: Path) -> None:
    """As bash asks: the line and the cursor in the environment, the answer in a file."""
    answer = tmp_path / "answer"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "_ARGCOMPLETE_IFS": "\n"}
    done = run(tmp_path, "-m", "experiments.command", **asked, _ARGCOMPLETE_STDOUT_FILENAME=str(answer))
    assert done.returncode == 0, done.stderr
    assert offered <= set(answer.read_text(encoding="utf-8").split())


def test_no_hint_installs_a_package_that_is_on_no_index() -> None:
    """``pip install lance-ref`` fails; from the checkout it is ``-e .``."""
    files = [
        path
        for name in ("analysis", "experiments", "lance_ref", "benchmarks", "docs")
        for path in (ROOT / name).rglob("*")
    ]
    for path in [*files, *ROOT.glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]:
        if path.suffix in (".py", ".md", ".ipynb", ".yaml"):
            text = path.read_text(encoding="utf-8")
            assert not re.search(r"pip install[^\n`]*[ '\"]lance[-_]ref", text), path
            assert not re.search(r'else \\?"lance-ref', text), path


def test_notation_and_conformance_say_what_the_code_does() -> None:
    """The Gram matrix of two batches is their sum: of [1, 2] and [3, 4] it is 1 + 4 + 9 + 16 = 30, not 15."""
    from lance_ref.algebra.grams import LayerGrams

    grams = LayerGrams("layer", (1, 2), [True, False])
    grams.add(np.array([[1.0, 2.0]]))
    grams.add(np.array([[3.0, 4.0]]))
    assert grams.grams[0] is not None
    assert grams.grams[0].tolist() == [[30.0]]
    for name in ("notation.md", "conformance.md"):
        lines = (ROOT / "docs" / name).read_text(encoding="utf-8").splitlines()
        (line,) = [line for line in lines if "Σ_j A_(n) A_(n)ᵀ" in line]
        assert "sum" in line
        assert "not a mean" in line


# ---- an installed package --------------------------------------------------------------------


def test_an_installed_package_has_its_data_and_says_what_was_not_run(tmp_path: Path) -> None:
    """A wheel in a folder of its own: shipped spectra are there; of results that are not, the verdict is another."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("analysis", "experiments", "lance_ref"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check", "-q"]
    built = run(tmp_path, "-m", "pip", "install", *options, "--target", str(target), str(source))
    if built.returncode and "setuptools" in built.stderr:
        pytest.skip("the wheel cannot be built without setuptools 77")
    assert built.returncode == 0, built.stderr
    path = str(target)
    done = run(tmp_path, "-m", "analysis.cost_model", *CASE, PYTHONPATH=path)
    assert "mobilenetv2_224.json" in json.loads(done.stdout)["ranks_from"], done.stderr
    where = run(tmp_path, "-c", "import analysis; print(analysis.__file__)", PYTHONPATH=path)
    assert where.stdout.startswith(path)
    waiting = next(claim for claim in claims.ledger()[1].values() if claim.evidence != [claims.LIVE])
    done = run(tmp_path, "-m", "experiments.ledger.claims", "--run", waiting.id, "--json", PYTHONPATH=path)
    (found,) = json.loads(done.stdout)
    assert (found["verdict"], found["missing"]) == (NOT_RUN, True)
    assert found["why"] == f"needs {waiting.command}"
    assert done.returncode == 0
    script = target / "bin" / "lance-ref"
    (tmp_path / "analysis.py").write_text("raise SystemExit('not ours')")
    done = run(tmp_path, str(script), "claims", "--run", waiting.id, PYTHONPATH=path)
    assert f"verdict  {NOT_RUN}: needs {waiting.command}" in done.stdout


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_committed_results_are_as_they_were_written(path: Path) -> None:
    """The checksum in each is that of its contents."""
    assert read_json(path, most_bytes=path.stat().st_size)
