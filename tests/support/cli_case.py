"""What the tests of the command line share: the published case, and the report as JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from analysis.cost_model import main

ROOT = Path(__file__).parents[2]
RANKS = "features.17.conv.2=64,160,2,2;features.18.0=64,128,2,2"
CASE = ["--net", "mobilenetv2", "--batch", "128", "--num-classes", "10", "--tune", "last:2"]


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--format", "json"]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result


def strict_json(path: Path) -> dict[str, Any]:
    """A result file; NaN and infinities, which are no JSON, are refused."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{path} holds {constant}, which is no JSON")

    document: dict[str, Any] = json.loads(path.read_text(), parse_constant=refuse)
    return document
