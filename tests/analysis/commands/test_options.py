"""What every command does with its options and with Ctrl-C: one check before any work, one line, 2 or 130."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

QUICK = "--quick"
COMMANDS: dict[str, list[str]] = {
    "experiments.finetune": [QUICK],
    "experiments.finetune.sweep": [QUICK],
    "experiments.descent": [QUICK],
    "experiments.domain_shift": [QUICK],
    "experiments.continual": [QUICK],
    "experiments.adapt": [],
}
"""Commands that train, with arguments for a short run."""

EVERYWHERE = [["--figure", "x.gif"], ["--figure", "no/such/folder/x.png"], ["--output", "."]]
WHERE_IT_IS: dict[str, list[list[str]]] = {
    "--lr": [["--lr", "nan"], ["--lr", "0"], ["--lr", "-1"], ["--lr", "inf"]],
    "--clip": [["--clip", "0"], ["--clip", "nan"]],
    "--scheduler": [["--scheduler", "nonsense"]],
    "--net": [["--net", "zzz"]],
    "--data": [["--data", "zzz"]],
    "--tune": [["--tune", "zzz"]],
    "--epsilon": [["--epsilon", "nan"], ["--epsilon", "1.5"]],
    "--batch": [["--batch", "0"], ["--batch", "1" + "0" * 31]],
    "--epochs": [["--epochs", "0"]],
    "--seeds": [["--seeds", "-1"]],
    "--jobs": [["--jobs", "0"]],
}
CASES = [
    (module, bad)
    for module in COMMANDS
    for bad in EVERYWHERE + [bad for option in WHERE_IT_IS for bad in WHERE_IT_IS[option]]
]


def has(module: str, option: str) -> bool:
    parser = importlib.import_module(module).parser()
    return option in parser._option_string_actions


@pytest.mark.parametrize(
    ("module", "bad"), CASES, ids=lambda value: value if isinstance(value, str) else " ".join(value)
)
def test_a_bad_option_is_refused_before_any_work(
    module: str, bad: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One line, exit code 2, within a second: no data set is opened, no cell is looked up."""
    if not has(module, bad[0]):
        pytest.skip(f"{module} has no {bad[0]}")
    monkeypatch.chdir(tmp_path)

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("work began before the options were checked")

    for work in ("lance_ref.datasets.load", "analysis.commands.sweep.run_cells"):
        monkeypatch.setattr(work, never)
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(module).main([*COMMANDS[module], *bad])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert bad[0] in error or bad[1] in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("module", ["analysis.validate", "experiments.continual"])
def test_ctrl_c_is_one_line(module: str, tmp_path: Path) -> None:
    """Exit code 130; what is kept is said, and that the same command goes on."""
    command = [sys.executable, "-m", module, "--quick", "--folder", "cells", "--jobs", "2"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )  # fmt: skip
    deadline = time.time() + 60
    while not list(tmp_path.glob("cells/*.json")) and process.poll() is None and time.time() < deadline:
        time.sleep(0.05)
    assert process.poll() is None, "it was over before it could be stopped"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does, to all processes of the command
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    last = stderr.splitlines()[-1]
    assert "stopped; what is finished is kept in cells, and the same command goes on from there" in last
    assert "Traceback" not in stderr
