"""Every number that a command prints is the number of its JSON, whole, at any width and for any number of methods."""

from __future__ import annotations

import io
import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from analysis.commands.console import PIPE_WIDTH, Sheet, as_text, readable
from analysis.commands.names import plain
from analysis.cost_model import cost
from analysis.cost_model import main as cost_main
from analysis.plan import main as plan_main
from analysis.planner.costs import Memory
from analysis.planner.fidelity import Fidelity
from analysis.planner.options import Option
from analysis.planner.search import Candidate, Row, _rank
from analysis.reports.footnotes import footnotes
from analysis.reports.report import Report
from analysis.reports.tables import change, render, totals_table
from analysis.steps.methods import METHODS
from experiments.ledger import claims, explain
from lance_ref import models, nn

WIDTHS = (40, 80, 120, 200, 400)
NUMBER = re.compile(r"-|[0-9][0-9,]*(\.[0-9]+)?x?")
ALL = list(METHODS)


def numbers(text: str) -> Counter[str]:
    """How often each word that is a number stands in the tables of the text, without rules."""
    words = (word for line in text.splitlines() for word in line.split())
    return Counter(word for word in words if NUMBER.fullmatch(word))


def tables(text: str) -> str:
    """From the first table's title to the end of the last, which a blank line divides from the sentences below."""
    return text[text.index("Totals (") :].rpartition("\n\n")[0]


def prose(text: str) -> str:
    """The text without its line breaks."""
    return " ".join(text.split())


def expected(document: dict[str, Any], accountings: Sequence[str]) -> Iterator[str]:
    """What the three tables of a report must show, worked out from its JSON alone."""
    methods, totals = list(document["totals"]), document["totals"]
    every = [*document["layers"], {"methods": totals}]
    for row in every:
        of = row["methods"]
        if row is every[-1] or any(any(c["activation_bytes"].values()) or c["subspace_bytes"] for c in of.values()):
            for method in methods:
                for name in accountings:
                    yield f"{of[method]['activation_bytes'][name]:,}" if method in of else "-"
                if totals[method]["subspace_bytes"]:
                    yield f"{of[method]['subspace_bytes']:,}" if method in of else "-"
    for row in every:
        of = row["methods"]
        flops = [cost["flops"] for cost in of.values()]
        forward_only = len(of) == len(methods) and all(f["total"] == f["forward"] for f in flops)
        if row is every[-1] or (any(f["total"] for f in flops) and not forward_only):
            for method in methods:
                total = of[method]["flops"]["total"] if method in of else None
                yield "-" if total is None else f"{total / 1e6:,.3f}" if total else "0"
    most = max(*(c["flops"]["total"] for c in totals.values()), *(c["elementwise"] for c in totals.values()))
    scale = 1e9 if most >= 1e8 else 1e6  # of the nets here, all of which hold more than a tenth of a MiB
    for method in methods:
        c = totals[method]
        yield f"{document['peak'][method]['peak_bytes'] / 2**20:,.3f}"
        kept = [c["activation_bytes"][name] for name in accountings] + [c["subspace_bytes"]]
        for nbytes in (*kept, c["activation_bytes"]["tape"] + c["subspace_bytes"]):
            yield f"{nbytes / 2**20:,.3f}"
        for work in (c["flops"]["total"], c["elementwise"]):
            yield f"{work / scale:,.3f}"
        if method != "bp" and "bp" in totals:
            for name in accountings:
                if c["activation_bytes"][name]:
                    yield f"{totals['bp']['activation_bytes'][name] / c['activation_bytes'][name]:,.2f}x"


def check(report: Report, text: str, accountings: Sequence[str] = ("paper", "pytorch", "tape")) -> None:
    document = json.loads(report.json_text())
    missing = Counter(expected(document, accountings)) - numbers(tables(text))
    assert not missing, missing
    assert "…" not in text


@pytest.fixture(scope="module", name="reports")
def _reports() -> dict[int, Report]:
    """The first n methods, on a net whose bytes have up to eight digits."""
    return {n: cost("resnet18", batch=8, method=ALL[:n], num_classes=10, tune="last:4") for n in (1, 2, 3, 4, 5, 15)}


@pytest.mark.parametrize("across", WIDTHS)
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 15])
def test_no_digit_is_cut_off(reports: dict[int, Report], count: int, across: int) -> None:
    """Every number of the JSON stands in the text as often as in the tables; no line of numbers is too long."""
    text = render(reports[count], across=across, wide=True)
    check(reports[count], text)
    assert max(len(line) for line in tables(text).splitlines()) <= across


@pytest.mark.parametrize("count", [2, 4, 5, 15])
def test_the_text_has_no_other_numbers_when_it_is_narrow(reports: dict[int, Report], count: int) -> None:
    """Blocks below each other have the words of one wide table: nothing is lost, added or joined."""
    wide = tables(render(reports[count], across=100_000, wide=True))
    for across in WIDTHS:
        narrow = tables(render(reports[count], across=across, wide=True))
        assert set(numbers(narrow)) == set(numbers(wide))
        assert not numbers(wide) - numbers(narrow)


@pytest.mark.parametrize("name", models.names())
def test_every_net(name: str) -> None:
    """Long names of layers and large numbers, 80 characters wide."""
    report = cost(name, batch=64, method=["bp", "lance", "int8"], tune="all", ranks="0.25")
    check(report, render(report, across=80, wide=True))


def test_accountings_of_many_methods(reports: dict[int, Report]) -> None:
    """Those asked for, and no others."""
    check(reports[15], render(reports[15], ["paper", "tape"], across=80, wide=True), ["paper", "tape"])


class Terminal(io.StringIO):
    """A text stream that says it is a terminal."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("across", [40, 80, 250])
@pytest.mark.parametrize("terminal", [True, False])
def test_terminal_and_pipe(across: int, terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command prints the same numbers to both, and keeps to the width."""
    monkeypatch.setenv("COLUMNS", str(across))
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr("sys.stdout", stream)
    case = ["--net", "mobilenetv2", "--batch", "8", "--method", "bp", "lance", "lora"]
    assert cost_main([*case, "--wide"]) == 0
    text = re.sub(r"\x1b\[[0-9;]*m", "", stream.getvalue())
    check(cost("mobilenetv2", batch=8, method=case[-3:]), text)
    assert max(len(line) for line in tables(text).splitlines()) <= across
    assert max(len(line) for line in text.splitlines()) <= max(across, 60)  # the name of a module is not broken


@pytest.mark.parametrize("across", [40, 80, 200])
def test_a_plan(across: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes in KiB, rounded up to a tenth; fidelities and FLOPs with three digits."""
    case = ["--net", "convnet", "--num-classes", "10", "--batch", "2", "8", "--budget", "500KiB"]
    assert plan_main([*case, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    monkeypatch.setenv("COLUMNS", str(across))
    assert plan_main(case) == 0
    text = capsys.readouterr().out
    wanted: Counter[str] = Counter()
    shown: set[tuple[str, str, bool | None]] = set()
    for row in document["rows"]:
        of = row["best"] or row["next"]
        key = row["engine"], row["method"], row["calibrated_elsewhere"]
        if of is None or key in shown:  # dashes, or another setting of a method that stands there already
            shown.add(key)
            continue
        shown.add(key)
        if not row["fits"]:
            wanted += Counter([f"{-(-10 * of['over_bytes'] // 1024) / 10:,.1f}"])
            continue
        training = of["step_bytes"] + of["factors_bytes"] + of["weights_bytes"]
        sizes = [training, of["total_bytes"], *([of["calibration_bytes"]] if of["calibration_bytes"] else [])]
        wanted += Counter(f"{-(-10 * size // 1024) / 10:,.1f}" for size in sizes)
        wanted += Counter([f"{of['flops_over_bp']:.3f}", str(of["layers"]), str(of["batch"])])
        if of["fidelity"] is not None:
            wanted += Counter([f"{of['fidelity']:.3f}"])
    assert {row["fits"] for row in document["rows"]} == {True, False}
    assert not wanted - numbers(text)
    body = text[text.index("What fits") : text.index("fidelity not predicted (")]
    assert max(len(line) for line in body.splitlines()) <= across


@pytest.mark.parametrize("name", ["mobilenetv2-last2", "deit-last4-bp-work", "pytorch-resnet18-last4-lance"])
def test_an_explanation(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every figure of ours that is not 0, in bytes or in billions of multiply-adds."""
    assert explain.main(["--claim", name, "--json"]) == 0
    (document,) = json.loads(capsys.readouterr().out)
    assert explain.main(["--claim", name]) == 0
    words = set(capsys.readouterr().out.split())
    shown = document["ours"] if document["case"].get("method") == "lance" else {"bp": document["ours"]["bp"]}
    for method, figures in shown.items():
        for part in ("paper", "pytorch", "tape", "factors", "bases"):
            assert not figures[part] or f"{figures[part]:,}" in words, part
        for part in ("forward", "grad_input", "grad_weight", "projection"):
            for where in ("net", "tuned"):
                macs = figures[where][part]
                assert not macs or f"{macs / 1e9:,.3f}" in words, (method, where, part)


def test_the_list_of_explanations(capsys: pytest.CaptureFixture[str]) -> None:
    """Name, published figure and ours are words of their own in every line."""
    assert explain.main([]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    for row, line in zip(explain.published()[1].values(), lines, strict=False):
        words = line.split()
        printed = f"{row.value} {row.unit}".split()
        assert words[: 1 + len(printed)] == [row.id, *printed]
        assert re.fullmatch(r"[0-9][0-9,]*\.[0-9]+", words[1 + len(printed)]), line


def test_claims(capsys: pytest.CaptureFixture[str]) -> None:
    """Figure, verdict and reason are the JSON's to the letter."""
    names = ["activation-reduction", "small-batches"]
    known = list(claims.ledger()[1])
    names = [name for name in names if name in known] or known[:2]
    claims.main(["--run", *names, "--json"])
    documents = json.loads(capsys.readouterr().out)
    claims.main(["--run", *names])
    text = capsys.readouterr().out
    for document in documents:
        assert f"  figure   {document['figure']}\n" in text
        assert f"  verdict  {document['verdict']}" in text
        assert document["why"] in text


def test_rows_that_keep_nothing_are_folded() -> None:
    """Each operation stands in the table or is counted in the line below, and not both."""
    report = cost("convnet", batch=2, tune="last:1", ranks="0.5")
    body = render(report, across=400).split("Kept for the backward pass")[1]
    listed = [row.name for row in report.rows if re.search(rf"^{re.escape(row.name)} ", body, re.M)]
    found = re.search(r"^\((\d+) keep nothing\)$", body, re.M)
    assert found is not None
    assert len(listed) + int(found[1]) == len(report.rows)


def test_what_is_shown_as_zero_counts_as_zero() -> None:
    """0.0004 is 0.000 in the table: it stands behind what is not predicted, and 0.0006 before it."""
    memory = Memory(1, 0, 0, 0, 0)

    def row(estimate: float | None) -> Row:
        of = None if estimate is None else Fidelity(estimate, 0.0, 1.0)
        one = Candidate(Option("bp"), 1, 1, of, None, memory, Fraction(1), 1, 0, False)
        return Row(Option("bp"), one, {1: 1}, None)

    assert _rank(row(0.0006)) < _rank(row(None)) < _rank(row(0.0004)) < _rank(Row(Option("bp"), None, {}, None))


# ---- what shrinks and what grows -------------------------------------------------------------


def test_what_grows_is_said_to_grow_and_first() -> None:
    """A batch of 2 on MobileNetV3: the factors are more than they save; nothing "shrinks by 0.56x"."""
    report = cost("mobilenetv3-small", batch=2, ranks="0.25", num_classes=10)
    ratio = report.totals["bp"].tape_and_factors / report.totals["lance"].tape_and_factors
    assert ratio < 0.9
    text = prose(render(report))
    grows = f"lance takes more memory than bp here: what this library keeps grows {1 / ratio:.2f} times."
    assert f" What it means: {grows} With lance the tape" in text
    assert f"with the fixed factors, which stay in memory beside it, it grows {1 / ratio:.2f} times." in text
    assert not re.search(r"shrinks (by )?0\.", render(report))


def test_any_method_that_takes_more_is_named() -> None:
    """LoRA keeps the inputs of its own layers beside those that it adapts; bp is no method beside bp."""
    report = cost("mlp", batch=2, input_shape=(20,), num_classes=10, tune="last:1", method=["bp", "lora", "int8"])
    totals = report.totals
    for method in ("lora", "int8"):
        more = totals[method].tape_and_factors > 1.05 * totals["bp"].tape_and_factors
        assert (f"{method} takes more memory than bp here" in prose(render(report))) == more
    assert "bp takes more" not in render(report)


@pytest.mark.parametrize(
    ("saved", "words"), [(5 * 10**9, "takes 5.000 GMACs more"), (-(10**9), "takes 1.000 GMACs less")]
)
def test_a_hosvd_that_is_cheaper_takes_less(reports: dict[int, Report], saved: int, words: str) -> None:
    """Not "-1.000 GMACs more a step"."""
    report = reports[4]
    costs = {m: replace(of, saved_macs_per_step=saved) for m, of in report.calibration.items()}
    assert costs
    text = "\n".join(footnotes(replace(report, calibration=costs)))
    assert f"A HOSVD at every step at these ranks {words} a step; against it, the calibration is " in text


@pytest.mark.parametrize(
    ("times_less", "words"),
    [
        (2.0, "shrinks 2.00 times"), (1.06, "shrinks 1.06 times"), (1.05, "hardly changes (to 95.2 %)"),
        (1.0, "hardly changes (to 100.0 %)"), (0.96, "hardly changes (to 104.2 %)"), (0.95, "grows 1.05 times"),
        (0.5, "grows 2.00 times"), (0.0, "grows from nothing"), (None, "shrinks to nothing"),
    ],
)  # fmt: skip
def test_words_for_a_ratio(times_less: float | None, words: str) -> None:
    """Near 1, above, below, and at the ends."""
    assert change(times_less) == words


# ---- the table itself ------------------------------------------------------------------------


def test_a_name_that_is_longer_than_the_line_is_folded() -> None:
    """The number stands whole on the next line."""
    sheet = Sheet("t", ["layer", "bytes"])
    sheet.add("a" * 50, "1,234,567")
    lines = as_text(lambda on: on.print(sheet), 40).splitlines()
    words = [word for line in lines for word in line.split()]
    assert "1,234,567" in words
    assert "".join(word for word in words if set(word) == {"a"}) == "a" * 50


def test_a_row_does_not_take_more_cells_than_there_are_columns() -> None:
    """They would be lost; missing cells are empty."""
    sheet = Sheet("t", ["layer", "bytes"])
    with pytest.raises(ValueError, match="a row has 3 cells, the table 2 columns"):
        sheet.add("a", "1", "2")
    sheet.add("a")
    sheet.rule()
    assert sheet.rows[0] == ["a", ""]
    assert len(sheet.rows) == 2


def test_words_are_at_the_left_and_numbers_at_the_right() -> None:
    """By hand: a rule below the names of the columns and above the last row."""
    sheet = Sheet("title", ["layer", "op", "bytes"], 2)
    sheet.add("a", "conv2d", "7")
    sheet.rule()
    sheet.add("total", "", "12,345")
    assert as_text(lambda on: on.print(sheet), 80) == (
        "\ntitle\nlayer  op       bytes\n-----  ------  ------\na      conv2d       7\n-----  ------  ------\n"
        "total          12,345\n\n"
    )
    lines = [line.rstrip() for line, _ in sheet.lines(14)]
    assert lines == [
        "title", "layer  op", "─────  ──────", "a      conv2d", "─────  ──────", "total", "",
        "layer   bytes", "─────  ──────", "a           7", "─────  ──────", "total  12,345",
    ]  # fmt: skip


def test_names_do_not_steer_the_terminal() -> None:
    """Control characters of a layer's name are written out."""
    assert plain("a\x1b[31m\x07é\u202e") == "a\\x1b[31m\\x07é\\u202e"
    sheet = Sheet("t\x1b[2J", ["layer\x1b", "bytes"])
    sheet.add("x\x1b[2J", "1")
    assert "\x1b" not in as_text(lambda on: on.print(sheet))


def test_ranks_that_differ_have_columns_of_their_own() -> None:
    """lance-mean-free has one channel fewer; one column where all methods have the same ranks."""
    report = cost("convnet", batch=4, tune="last:1", method=["lance", "hosvd"], ranks="0.5")
    assert re.search(r"^layer +op +activation +output +ranks +lance paper", render(report, across=200, wide=True), re.M)
    report = cost("convnet", batch=4, tune="last:1", method=["bp", "lance", "lance-mean-free"], ranks="1.0")
    text = render(report, across=200, wide=True)
    assert re.search(r"^layer +op +activation +output +lance ranks +lance-mean-free ranks +bp paper", text, re.M)
    ranks = next(row for row in report.rows if row.tuned).methods
    for method in ("lance", "lance-mean-free"):
        assert ",".join(map(str, ranks[method].ranks or ())) in text.split()


def test_the_totals_print_anywhere(reports: dict[int, Report]) -> None:
    """``totals_table(report)`` for a console of the reader's own."""
    from rich.console import Console

    text = io.StringIO()
    table = totals_table(reports[3], wide=True)
    Console(file=text, width=50).print(table)
    assert not set(numbers(as_text(lambda on: on.print(table), PIPE_WIDTH))) - set(numbers(text.getvalue()))


def test_what_grows_is_called_that(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Cores and factors that are larger than the activations: "grows 1.8 times", and never "shrinks by 0.56x"."""
    monkeypatch.setenv("COLUMNS", "250")
    assert cost_main(["--net", "mobilenetv3-small", "--batch", "1", "--ranks", "0.9", "--format", "json"]) == 0
    totals = json.loads(capsys.readouterr().out)["totals"]
    assert cost_main(["--net", "mobilenetv3-small", "--batch", "1", "--ranks", "0.9"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("What it means")]
    kept = totals["lance"]["activation_bytes"]["tape"] + totals["lance"]["subspace_bytes"]
    times = kept / totals["bp"]["activation_bytes"]["tape"]
    assert times > 1.2
    assert line.startswith("What it means: lance takes more memory than bp here")
    assert f"grows {times:,.2f} times" in line
    assert "shrinks by" not in line


@pytest.mark.parametrize(
    ("n", "text"), [(104_858, "0.100 MiB"), (104_857, "102.399 KiB"), (5, "0.005 KiB"), (0, "nothing")]
)
def test_little_memory_is_in_kib(n: int, text: str) -> None:
    """Three decimals always leave three digits, or the bytes themselves are few."""
    assert readable(n) == text


def test_a_small_net_is_not_a_column_of_zeros() -> None:
    """The bytes of one linear layer at batch 4, in KiB, and its work in thousands."""
    net = nn.Sequential(nn.Linear(16, 10, rng=0))
    text = render(cost(net, input_shape=(16,), batch=4, method="bp"), across=80)
    assert "Totals (memory in KiB" in text
    assert "in thousands)" in text
    assert "0.250" in tables(text)  # its input, 4 x 16 x 4 bytes
