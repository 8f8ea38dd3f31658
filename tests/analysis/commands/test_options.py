"""Every option of the experiments is checked before anything is looked up or run, and one without effect is refused."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from analysis.commands import cli, command_line, sweep
from analysis.reports import continual_bill
from analysis.steps.nets import build, trace_step
from lance_ref import datasets, training
from lance_ref.lance import calibration

COMMANDS = ("adapt", "continual", "descent", "domain_shift", "finetune", "finetune_sweep", "validate")
NUMBERS = {
    "positive": ["0", "-1", "nan", "inf", "-inf", "1e400", "x", ""],
    "count": ["0", "-1", "1.5", "nan", "x", "", "9" * 31, "1_000", "٣"],
    "share": ["0", "1.01", "nan", "inf", "x"],
    "below": ["1", "-0.1", "nan"],
    "seed": ["-1", "1.5", "9" * 31],
}
KINDS = {
    "lr": "positive", "clip": "positive", "budget-kib": "positive", "lr-grid": "positive", "epsilon": "share",
    "ratio": "share", "share": "share", "threshold": "share", "momentum": "below", "threshold-step": "below",
    "seed": "seed", "seeds": "count", "epochs": "count", "batch": "count", "steps": "count", "trials": "count",
    "jobs": "count", "patch": "count", "image-size": "count", "train-images": "count", "test-images": "count",
    "calibration-batches": "count", "tuning-epochs": "count", "basis-samples": "count", "memory": "count",
    "eval-batch": "count", "tasks": "count",
}  # fmt: skip
NAMES = {
    "figure": ["x.gif", "x", "", "no/such/x.png", "."],
    "output": ["x.txt", "no/such/x.json", "", "x.JSON.gz"],
    "table": ["x.json", "no/such/x.md"],
    "scheduler": ["nonsense", "tcp://", "carrier-pigeon://host:1", ""],
    "folder": ["", "/dev/null", "/dev/null/x", "a\0b"],
    "net": ["zzz"], "nets": ["zzz"], "data": ["zzz"], "tune": ["zzz", "last:0", "last:99", "last:x"],
    "calibrate-on": ["zzz"], "modes": ["zzz", "depth"], "learners": ["zzz"], "scenario": ["zzz"],
}  # fmt: skip


def _cases() -> list[tuple[str, str, str]]:
    found = []
    for command in COMMANDS:
        parser = importlib.import_module(f"analysis.{command}").parser()
        for action in parser._actions:
            for option in (name.removeprefix("--") for name in action.option_strings[:1]):
                bad = NUMBERS[KINDS[option]] if option in KINDS else NAMES.get(option, [])
                if command == "validate" and option == "ranks":
                    bad = NUMBERS["share"]
                found += [(command, option, text) for text in bad]
    return found


@pytest.fixture(name="nothing_runs")
def _nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """No image is read, no cell is looked up, and nothing is calibrated or trained."""

    def never(*_: Any, **__: Any) -> Any:
        pytest.fail("it was looked up or run")

    importlib.import_module("experiments.finetune.cell")  # it binds fit() for good, so it has to be the real one
    for module, name in ((datasets, "load"), (sweep, "run_cells"), (sweep, "_read"), (training, "fit")):
        monkeypatch.setattr(module, name, never)
    monkeypatch.setattr(calibration, "calibrate", never)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("quick", [True, False])
def test_bad_options_of_every_command(
    command: str, quick: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and one line that names option and value; no file is made, and no image is read."""
    monkeypatch.chdir(tmp_path)
    main: Callable[[list[str]], int] = importlib.import_module(f"analysis.{command}").main
    for _, option, text in (case for case in _cases() if case[0] == command):
        arguments = [f"--{option}={text}", *(["--quick"] if quick and command != "adapt" else [])]
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        error = capsys.readouterr().err
        assert stopped.value.code == 2, arguments
        assert error.count("\n") == 1, arguments
        assert f"--{option} is " in error, (arguments, error)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("command", "arguments", "option", "needs"),
    [
        ("finetune", ["--methods", "bp", "--epsilon", "0.9"], "--epsilon", "lance"),
        ("finetune", ["--methods", "lance@0.9", "--epsilon", "0.9"], "--epsilon", "without a value of its own"),
        ("finetune", ["--methods", "lance", "--budget-kib", "3"], "--budget-kib", "asi"),
        ("finetune", ["--methods", "lance", "--patch", "3"], "--patch", "gradient-filter"),
        ("finetune", ["--methods", "lance", "--ratio", "0.5"], "--ratio", "sketch"),
        ("finetune", ["--methods", "asi", "--modes", "batch"], "--modes", "lance"),
        ("finetune", ["--lr-grid", "0.1"], "--lr-grid", "--recipe tuned"),
        ("finetune", ["--tuning-epochs", "3"], "--tuning-epochs", "--recipe tuned"),
        ("finetune", ["--recipe", "tuned", "--lr", "0.1"], "--lr", "--recipe papers"),
        ("finetune", ["--jobs", "2", "--scheduler", "tcp://127.0.0.1:1"], "--jobs", "without --scheduler"),
        ("finetune_sweep", ["--jobs", "2", "--scheduler", "tcp://127.0.0.1:1"], "--jobs", "without --scheduler"),
        ("continual", ["--jobs", "2", "--scheduler", "tcp://127.0.0.1:1"], "--jobs", "without --scheduler"),
        ("continual", ["--learners", "gpm", "--memory", "9"], "--memory", "er"),
        ("continual", ["--learners", "gpm", "--epsilon", "0.9"], "--epsilon", "lance"),
        ("continual", ["--learners", "er", "--threshold", "0.9"], "--threshold", "gpm"),
        ("continual", ["--learners", "er", "--basis-samples", "9"], "--basis-samples", "gpm"),
    ],
)
def test_an_option_without_effect_is_refused(
    command: str, arguments: list[str], option: str, needs: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The line says what the option would take."""
    pytest.importorskip("distributed")
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"analysis.{command}").main(["--quick", f"--folder={tmp_path}", *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert f"{option} has no effect here: it needs" in error
    assert needs in error


def test_options_with_an_effect_pass() -> None:
    """The same options beside what they need."""
    from experiments.continual import command as continual
    from experiments.finetune import command as finetune

    for arguments in (
        ["--methods", "lance@0.9", "lance-int8", "--epsilon", "0.9", "--modes", "batch"],
        ["--methods", "lance-sketch@0.9", "--ratio", "0.5"],
        ["--recipe", "tuned", "--lr-grid", "0.1", "--tuning-epochs", "3"],
        ["--recipe", "tuned", "papers", "--lr", "0.1"],
    ):
        finetune.checked(finetune.parser().parse_args(["--quick", *arguments]))
    continual.checked(continual.parser().parse_args(["--learners", "lance", "--threshold", "0.9", "--epsilon", "0.9"]))
    continual.checked(continual.parser().parse_args(["--learners", "er", "--memory", "9"]))


@pytest.mark.parametrize("command", ["finetune_sweep", "domain_shift", "finetune"])
def test_quick_overrides_nothing_that_was_given(command: str) -> None:
    """--quick changes defaults: what stands on the command line, even the usual default, stays."""
    module = importlib.import_module(f"analysis.{command}")
    given = module.parser().parse_args(["--quick", "--net=mcunet", "--tune=last:4", "--lr=0.05"])
    cli.fill_in(given, module.QUICK)
    assert (given.net, given.tune, given.lr, given.data) == ("mcunet", "last:4", 0.05, "digits")


def test_two_outputs_of_one_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second would replace the first."""
    p = command_line.OneLineParser(prog="x")
    p.add_argument("--output", type=cli.any_file)
    p.add_argument("--figure", type=cli.any_file)
    assert p.parse_args([f"--output={tmp_path / 'a'}", f"--figure={tmp_path / 'b'}"]).given == {"output", "figure"}
    with pytest.raises(SystemExit):
        p.parse_args([f"--output={tmp_path / 'a'}", f"--figure={tmp_path / '.' / 'a'}"])
    assert "which is the file of --output, too" in capsys.readouterr().err


def test_a_folder_without_permission(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Found out before the work (the tests may run as root, who may write anywhere)."""
    monkeypatch.setattr("os.access", lambda *_: False)
    p = command_line.OneLineParser(prog="x")
    p.add_argument("--folder", type=cli.folder_to_write)
    p.add_argument("--output", type=cli.json_file)
    for argument in (f"--folder={tmp_path / 'a' / 'b'}", f"--output={tmp_path / 'a.json'}"):
        with pytest.raises(SystemExit):
            p.parse_args([argument])
        assert "cannot be written" in capsys.readouterr().err


def test_limits_of_numbers() -> None:
    """The ends of every range are in or out as they should be; a count is exact up to its limit."""
    assert cli.count(str(2**31 - 1)) == 2**31 - 1
    assert cli.seed("0") == 0
    assert cli.seed(str(2**32 - 1)) == 2**32 - 1
    assert cli.share("1") == 1
    assert cli.share_below_one("0") == 0
    assert cli.positive("1e-300") > 0
    assert cli.few("1000") == 1000
    for convert, text in ((cli.count, str(2**31)), (cli.seed, str(2**32)), (cli.few, "1001"), (cli.pixels, "8193")):
        with pytest.raises(Exception, match=f"is {text}, expected .*at most {int(text) - 1}"):
            convert(text)


def test_long_values_are_cut_in_messages() -> None:
    """A line stays readable, whatever was pasted."""
    with pytest.raises(Exception, match=r"^is '.{39}\.\.\. \(5000 characters\), expected"):
        cli.positive("x " * 2500)


def test_a_bill_of_too_many_tasks_is_refused() -> None:
    """Before a list for each task is made."""
    step = trace_step(build("mlp", 10, (64,), True), "mlp", (64,), 2, "all", "float32")
    with pytest.raises(ValueError, match="tasks is 10001, expected at least 2 and at most 10000"):
        continual_bill.bills(step, 10_001)
    assert len(continual_bill.bills(step, 3)) == 9
