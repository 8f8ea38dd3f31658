"""Every line that the cost model and the planner print fits the width; the answer and the peak come first."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest

from analysis.commands.console import PIPE_WIDTH, Sheet, as_text, shortened
from analysis.cost_model import cost, main
from analysis.plan import main as plan_main
from analysis.reports.report import Report
from analysis.reports.tables import render
from analysis.steps.methods import METHODS
from lance_ref import models

ROOT = Path(__file__).parents[3]
WIDTHS = (60, 80, 100, 160)
NETS = ("mobilenetv2", "mcunet", "deit-tiny", "mlp")
COUNTS = (1, 2, 4, 15)
CASES = sorted({*product(NETS, COUNTS), *((net, 2) for net in models.names())})
NUMBER = re.compile(r"[0-9][0-9,]*(?:\.[0-9]+)?x?")


@cache
def report_of(net: str, count: int) -> Report:
    methods = ["bp", "lance", *(name for name in METHODS if name not in ("bp", "lance"))]
    return cost(net, batch=8, method=methods[:count])


def units(text: str) -> tuple[int, int, float]:
    """Bytes of the totals' unit and of the layers', and the operations' scale, as the titles say them."""
    said = re.search(r"\(memory in (\w+),[^)]* in (\w+)\).*Kept for the backward pass \((\w+);", text)
    assert said is not None
    of_bytes = {"MiB": 2**20, "KiB": 2**10}
    return of_bytes[said[1]], of_bytes[said[3]], {"billions": 1e9, "millions": 1e6}[said[2]]


def printed(document: dict[str, Any], in_totals: int, in_layers: int, scale: float) -> set[str]:
    """Every number that a table may show, worked out from the JSON alone."""
    totals, peaks = document["totals"], {m: of["peak_bytes"] for m, of in document["peak"].items()}
    found = {f"{n / in_totals:,.3f}" for n in peaks.values()}

    def memory(of: dict[str, Any]) -> dict[str, int]:
        kept = of["activation_bytes"]
        return {**kept, "factors": of["subspace_bytes"], "both": kept["tape"] + of["subspace_bytes"]}

    for unit, row in [
        *((in_layers, row) for row in document["layers"]),
        (in_totals, {"methods": totals}),
        (in_layers, {"methods": totals}),
    ]:
        for of in row["methods"].values():
            found |= {f"{n / unit:,.3f}" for n in memory(of).values()}
    for method, of in totals.items():
        found |= {f"{n / scale:,.3f}" for n in (*of["flops"].values(), of["elementwise"])}
        if method != "bp" and "bp" in totals:
            pairs = [(memory(totals["bp"])[name], n) for name, n in memory(of).items()]
            pairs += [(totals["bp"]["flops"]["total"], of["flops"]["total"]), (peaks["bp"], peaks[method])]
            found |= {f"{a / b:,.2f}x" for a, b in pairs if b}
    return found


def first_table(text: str) -> str:
    """From the title of the totals on; further blocks of the same table belong to it."""
    return text[text.index("Totals") : text.index("Kept for the backward pass")]


def too_long(text: str, across: int) -> list[str]:
    """Lines that are longer than the width, but for a word, or a name and its only number, that do not fit."""
    return [line for line in text.splitlines() if len(line) > across and len(line.split()) > 2]


def check(report: Report, text: str, across: int) -> None:
    document = json.loads(report.json_text())
    lines = text.splitlines()
    assert not too_long(text, across)
    assert not re.search(r"[0-9,.][…~]|[…~][0-9,.]*(\s|$)", re.sub(r"[A-Za-z_][\w.]*[…~][\w.]*", "", text))
    assert any("What it means" in line for line in lines[:5])
    totals = first_table(text)
    words = set(totals.split())
    in_totals, in_layers, scale = units(" ".join(text.split()))
    for method, of in document["totals"].items():
        kept = (of["activation_bytes"]["tape"], of["subspace_bytes"], document["peak"][method]["peak_bytes"])
        assert {f"{n / in_totals:,.3f}" for n in kept} | {f"{of['flops']['total'] / scale:,.3f}"} <= words, method
    assert {"tape", "factors", "peak", "FLOPs"} <= words
    body = totals.partition("\n\n")[0] + text[text.index("Kept for the backward pass") :].partition("\n\n")[0]
    cells = (word for line in body.splitlines() for word in re.split(r" {2,}", line.strip())[1:])
    numbers = {word for word in cells if NUMBER.fullmatch(word) and ("." in word or "x" in word)}
    assert numbers
    assert numbers <= printed(document, in_totals, in_layers, scale)


@pytest.mark.parametrize(("net", "count"), CASES)
def test_every_width(net: str, count: int) -> None:
    """Lines fit, the sentence stands first, the peak stands in the first table, each number is the JSON's."""
    for across in WIDTHS:
        check(report_of(net, count), render(report_of(net, count), across=across), across)


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("net", ["mobilenetv2", "mlp"])
def test_all_columns_at_any_width(net: str, count: int) -> None:
    """--wide: the columns that do not fit stand in blocks below, and no column is left out."""
    for across in (40, *WIDTHS):
        text = render(report_of(net, count), across=across, wide=True)
        assert not too_long(text, across)
        assert "with --wide" not in text
        for column in ("paper", "pytorch", "elementwise", "grad_weight", "projection" if count > 1 else "forward"):
            assert column in first_table(text)
        assert "Products of one step" in text
        for method in report_of(net, count).methods:
            for name in ("paper", "pytorch", "tape", "total"):
                assert f"{method} {name}" in " ".join(text.split())


@pytest.mark.parametrize("count", COUNTS)
def test_forty_columns_cut_no_digit(count: int) -> None:
    """The four columns of the first table stand below each other where they do not fit beside each other."""
    check(report_of("mobilenetv2", count), render(report_of("mobilenetv2", count), across=40), 40)


def test_a_pipe_is_a_hundred_characters_wide() -> None:
    """Without COLUMNS and without a terminal; with COLUMNS as many as it says."""
    command = [sys.executable, "-m", "analysis.cost_model", "--net", "mobilenetv2", "--batch", "8"]
    without = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    plain, narrow = (
        subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=env, check=True).stdout
        for env in (without, {**without, "COLUMNS": "60"})
    )
    assert PIPE_WIDTH == 100
    assert 90 < max(map(len, plain.splitlines())) <= 100
    assert len(plain.splitlines()) < 60
    check(report_of("mobilenetv2", 2), plain, 100)
    check(report_of("mobilenetv2", 2), narrow, 60)


def in_terminal(command: list[str], across: int, **environment: str) -> str:
    """What the command writes to a pseudo terminal of that width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, across, 0, 0))
    left_out = ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR")
    env = {**{k: v for k, v in os.environ.items() if k not in left_out}, "TERM": "xterm-256color", **environment}
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=subprocess.PIPE, env=env, cwd=ROOT) as run:
        os.close(theirs)
        chunks = []
        while True:
            try:
                chunk = os.read(ours, 65536)
            except OSError:  # how Linux says that the other end was closed
                break
            if not chunk:
                break
            chunks.append(chunk)
    os.close(ours)
    assert run.returncode == 0
    return b"".join(chunks).decode().replace("\r\n", "\n")


@pytest.mark.parametrize(("across", "count"), [(60, 2), (80, 15), (100, 1), (160, 4)])
def test_a_terminal(across: int, count: int) -> None:
    """The same in a terminal, whose own width counts; colours unless NO_COLOR is set."""
    methods = report_of("mobilenetv2", count).methods
    command = [
        sys.executable,
        "-m",
        "analysis.cost_model",
        "--net",
        "mobilenetv2",
        "--batch",
        "8",
        "--method",
        *methods,
    ]
    no_color = {"NO_COLOR": "1"} if count == 1 else {}
    text = in_terminal(command, across, **no_color)
    assert bool(re.search(r"\x1b\[(?:\d;)*(?:3|4|9)\d", text)) == (not no_color)
    check(report_of("mobilenetv2", count), re.sub(r"\x1b\[[0-9;]*m", "", text), across)


@pytest.mark.parametrize("across", [40, *WIDTHS])
def test_a_plan(across: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Prose and tables of the planner keep to the width as well; code to paste, which no line can be cut of, to 80."""
    monkeypatch.setenv("COLUMNS", str(across))
    assert plan_main(["--net", "convnet", "--num-classes", "10", "--batch", "2", "8", "--budget", "500KiB"]) == 0
    said, _, code = capsys.readouterr().out.partition("To run the first of them:")
    assert code
    assert not too_long(said, across)
    assert not too_long(code, 80)


def test_a_plan_in_a_terminal() -> None:
    command = [sys.executable, "-m", "analysis.plan", "--net", "mlp", "--num-classes", "10", "--budget", "2MiB"]
    text = re.sub(r"\x1b\[[0-9;]*m", "", in_terminal(command, 70))
    assert not too_long(text.partition("To run the first of them:")[0], 70)


@pytest.mark.parametrize("across", [60, 80])
def test_a_measured_step(across: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """--measure: each line keeps to the width, but for one of a name and a number."""
    monkeypatch.setenv("COLUMNS", str(across))
    assert main(["--net", "convnet", "--batch", "2", "--tune", "last:1", "--method", "bp", "--measure"]) == 0
    out = capsys.readouterr().out
    table = out[out.index("Predicted beside measured") :]
    assert "no difference" in " ".join(table.split())
    assert all(len(line) <= across or len(re.findall(r"(?<= )[0-9,]+$", line)) == 1 for line in table.splitlines())
    assert across < 80 or not too_long(out, across)


def test_wide_needs_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    """JSON and CSV have everything anyway."""
    with pytest.raises(SystemExit):
        main(["--net", "mlp", "--wide", "--json"])
    assert "--wide has no effect here" in capsys.readouterr().err


# ---- the table itself ------------------------------------------------------------------------


def test_names_are_shortened_in_the_middle() -> None:
    """By hand: as many characters of the end as of the beginning."""
    assert shortened("features.1.block.conv.0", 17) == "features…k.conv.0"
    assert shortened("abc", 3) == "abc"
    assert [len(shortened("a" * 30, n)) for n in (5, 6, 29, 30, 31)] == [5, 6, 29, 30, 30]


def sheet(names: list[str], optional: list[list[str]]) -> Sheet:
    table = Sheet("t", ["layer", "op", "a", "b", "c"], 2, optional)
    for name in names:
        table.add(name, "conv", "1,000", "22,000", "333,000")
    return table


def test_columns_go_in_the_order_of_their_importance() -> None:
    """5 + 7 characters for layer and a; b needs 8 more, op 6 more, c 9 more."""
    table = sheet(["layer"], [["b"], ["op", "c"]])
    heads = {across: table.lines(across)[1][0].split() for across in range(12, 40)}
    assert heads[19] == ["layer", "a"]
    assert heads[20] == heads[34] == ["layer", "a", "b"]
    assert heads[35] == ["layer", "op", "a", "b", "c"]
    last = {across: table.lines(across)[-1][0] for across in (19, 34, 35)}
    assert last[19] == "(3 more columns with --wide)"
    assert last[34] == "(2 more columns with --wide)"
    assert last[35].split()[0] == "layer"
    assert all(len(a) <= len(b) for a, b in pairwise(heads[n] for n in range(12, 40)))


def test_shortened_names_stay_different() -> None:
    """They keep as many characters as they need for that, and a number keeps all of its digits."""
    names = [f"features.{i}.a.long.name.of.a.layer.conv.0" for i in (1, 2, 11, 21)]
    for across in (30, 40, 60, 80):
        lines = [line for line, _ in sheet(names, [["b"], ["op", "c"]]).lines(across)[3:7]]
        assert len({line.split()[0] for line in lines}) == 4
        assert all(line.split()[-1] in ("1,000", "22,000", "333,000") for line in lines)
    assert "~" in as_text(lambda on: on.print(sheet(names, [["b"], ["op", "c"]])), 40)
