"""Why a published figure differs from ours: every row of the list, and the rules that are tried on it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from cli_case import ROOT
from hypothesis import given
from hypothesis import strategies as st

from experiments.ledger import accounting_rules
from experiments.ledger.accounting_rules import RULES, Figures, Work, fits, readings
from experiments.ledger.explain import explain, line, main, text
from experiments.ledger.published import Published, choose, load_entries, published

ROWS = published()[1]
COSTS = list(ROWS.values())

NET = Work(forward=100, grad_input=40, grad_weight=7, projection=2, papers_grad_weight=9, full_projection=30)
TUNED = Work(forward=10, grad_input=4, grad_weight=5, projection=2, papers_grad_weight=6, full_projection=30)
BP = Figures(
    paper=3 * 2**20, pytorch=9 * 2**20, tape=4 * 2**20, factors=0, bases=0,
    net=Work(100, 40, 12, 0, 12, 0), tuned=Work(10, 4, 10, 0, 10, 0),
)  # fmt: skip
LANCE = Figures(paper=2**20, pytorch=7 * 2**20, tape=2 * 2**20, factors=2**19, bases=0, net=NET, tuned=TUNED)


@pytest.mark.parametrize("row", COSTS, ids=[row.id for row in COSTS])
def test_every_published_cost_is_met_or_explained_or_known_not_to_be(row: Published) -> None:
    """If a cost rule changed, a figure of the papers that we met or explained would no longer be."""
    found = explain(row)
    assert found.status == row.status
    if row.rules or found.status == "met":
        assert set(found.reading.rules) == set(row.rules)
    if found.status == "unexplained":
        assert "the nearest is" in text(found)


def test_the_figures_that_must_be_there_are_there() -> None:
    """A figure that this project promises to meet could be dropped from the list without anyone noticing."""
    inputs = {row.value for row in COSTS if row.rules == ["inputs-only"]}
    assert inputs == {"15.31", "28.71", "1651.84", "12.25", "30.63", "532.88", "24.50"}
    measured = {row.value for row in COSTS if row.source == "pytorch"}
    assert {"100.79", "70.16", "109.73", "81.02", "30.75", "24.63", "61.38", "43.00", "27.63", "24.56"} <= measured
    assert {"22..33", "2.32", "105", "250", "120.09", "1.86"} <= {row.value for row in COSTS}


# ---- the rules -----------------------------------------------------------------------------


def test_readings_of_memory_by_hand() -> None:
    """A rule that took away the wrong bytes, or the wrong unit, would explain figures that it does not."""
    found = {reading.rules: reading.value for reading in readings("memory", "MB", LANCE, BP)}
    assert found[()] == 7 * 2**20 / 1e6
    assert found["MB-for-MiB",] == 7
    assert found["inputs-only", "MB-for-MiB"] == 1
    assert found["inputs-only", "with-factors", "MB-for-MiB"] == 1.5
    assert found["no-core", "MB-for-MiB"] == 6
    ratios = {reading.rules: reading.value for reading in readings("memory-ratio", "x", LANCE, BP)}
    assert ratios == {
        (): 9 / 7, ("inputs-only",): 3, ("no-core",): 1.5, ("with-factors",): 9 / 7.5,
        ("inputs-only", "with-factors"): 2,
    }  # fmt: skip


def test_readings_of_work_by_hand() -> None:
    """The papers' bill: multiply-adds of forward and weight gradient, the projection at full size."""
    found = {frozenset(reading.rules): reading.value * 1e9 for reading in readings("work", "GFLOPs", LANCE, BP)}
    assert found[frozenset()] == pytest.approx(2 * (100 + 40 + 7 + 2))
    assert found[frozenset({"forward-twice"})] == pytest.approx(2 * (200 + 40 + 7 + 2))
    papers = {"tuned-only", "no-grad-input", "MACs-for-FLOPs"}
    assert found[frozenset(papers)] == pytest.approx(10 + 5 + 2)
    assert found[frozenset({*papers, "projection-at-full-size"})] == pytest.approx(10 + 5 + 30)
    assert found[frozenset({*papers, "projection-at-full-size", "papers-order"})] == pytest.approx(10 + 6 + 30)
    plain = {frozenset(reading.rules): reading.value * 1e9 for reading in readings("work", "GFLOPs", BP, BP)}
    assert plain[frozenset(papers)] == pytest.approx(20)
    assert not any("projection-at-full-size" in rules for rules in plain)


sizes = st.integers(1, 10**12)
works = st.builds(Work, sizes, sizes, sizes, sizes, sizes, sizes)


@given(works, works, st.sets(st.sampled_from([name for name in RULES if name.count("-") and "core" not in name])))
def test_whatever_the_rules_make_they_find_again(net: Work, tuned: Work, rules: set[str]) -> None:
    """A figure made by some rules must be explained by as many or fewer: else the search would miss readings."""
    figures = replace(LANCE, net=net, tuned=tuned)
    of_work = rules - {"inputs-only", "with-factors", "with-activations", "MB-for-MiB"}
    macs = accounting_rules._macs(figures, frozenset(of_work))
    value = (1 if "MACs-for-FLOPs" in of_work else 2) * macs / 1e9
    first = fits(value, 0.0, readings("work", "GFLOPs", figures, BP))[0]
    assert len(first.rules) <= len(of_work)
    assert first.value == pytest.approx(value)


# ---- planted faults --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mobilenetv2-last2", "deit-last4-bp-work", "pytorch-resnet18-last4-lance"])
def test_a_figure_that_is_one_percent_off_is_not_explained(name: str) -> None:
    """If some combination of rules gave nearly any number, an explanation would mean nothing."""
    row = ROWS[name]
    decimals = len(row.value.partition(".")[2])
    assert explain(replace(row, value=f"{1.01 * float(row.value):.{decimals}f}")).status == "unexplained"


def test_without_its_rule_a_figure_is_unexplained(monkeypatch: pytest.MonkeyPatch) -> None:
    """The published 15.31 MiB must be explained by the rule, not by something else that is always there."""
    monkeypatch.setattr(
        accounting_rules, "_memory", lambda quantity, unit, figures, base, _: [(figures.pytorch / 2**20, frozenset())]
    )
    found = explain(ROWS["mobilenetv2-last2"])
    assert found.status == "unexplained"
    assert found.reading.rules == ()
    assert found.reading.value > 50


# ---- command line and file -------------------------------------------------------------------


def test_one_figure_is_shown_under_every_accounting(capsys: pytest.CaptureFixture[str]) -> None:
    """The user asks why: all three accountings, both units of each, and the rule by name and meaning."""
    assert main(["--claim", "deit-last4-bp-work"]) == 0
    printed = capsys.readouterr().out
    for word in ("paper", "pytorch", "tape", "MiB", "MB", "MACs", "FLOPs", "22.31 GFLOPs", "explained"):
        assert word in printed
    for rule in ("MACs-for-FLOPs", "tuned-only", "no-grad-input"):
        assert f"{rule}: {RULES[rule]}" in printed


def test_a_figure_that_ranks_decide_says_which_would(capsys: pytest.CaptureFixture[str]) -> None:
    """Where the ranks are not printed, a number of ours beside the published one would prove nothing."""
    assert main(["--claim", "lance-105x", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["status"] == "by ranks"
    assert found["figure"] == pytest.approx(105, rel=0.01)
    assert "not published" in found["note"]
    assert "of each mode" in found["note"]


def test_ranks_do_not_explain_what_no_rank_gives() -> None:
    """More than the inputs of all tuned layers, or than the rules of its own table allow, stays unexplained."""
    row = ROWS["asi-mobilenetv2-cifar10-last2"]
    assert explain(replace(row, value="2000.0")).status == "unexplained"
    work = ROWS["deit-last2-lance-work"]
    assert explain(replace(work, value="900.00")).status == "unexplained"
    found = explain(replace(work, value="900.00"))
    assert "the nearest is" in text(found)


def test_an_unknown_figure_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A slip of the pen is answered in one line that helps, with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        main(["--claim", "mobilenetv2-last3"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "mobilenetv2-last2" in message


def test_each_line_of_the_list_says_id_and_status() -> None:
    """The list is read by people: figure as printed, ours with one digit more, status."""
    assert line(explain(ROWS["mobilenetv2-last2"])).split() == [
        "mobilenetv2-last2", "15.31", "MiB", "15.312", "explained", "inputs-only",
    ]  # fmt: skip


HEAD = "sources: {s: {paper: p, url: u}}\nentries:\n"
ENTRY = "  - {id: a, what: w, quantity: memory, value: '1', unit: MiB, source: s, where: x}\n"


@pytest.mark.parametrize(
    ("written", "named"),
    [
        ("[", "not YAML"),
        ("[]", "sources and entries"),
        (HEAD + ENTRY + ENTRY, "twice"),
        (HEAD + ENTRY.replace("unit: MiB, ", ""), "unit missing"),
        (HEAD + ENTRY.replace("unit:", "extra: 1, unit:"), "unknown keys extra"),
        (HEAD + ENTRY.replace("source: s", "source: t"), "not one of s"),
        ("sources: {s: {paper: p}}\nentries: []", "paper and url"),
        ("a: !!python/object/apply:os.getcwd []", "not YAML"),
    ],
)
def test_a_broken_list_is_one_line(tmp_path: Path, written: str, named: str) -> None:
    """A list with a slip in it must not be read as something else, nor run anything."""
    path = tmp_path / "list.yaml"
    path.write_text(written)
    with pytest.raises(ValueError, match=named) as error:
        load_entries(path, Published)
    assert "\n" not in str(error.value)


def test_choose_keeps_the_order_asked_for() -> None:
    """All entries without a question, else those that were asked for, in that order."""
    known = {"a": 1, "b": 2}
    assert choose("thing", [], known) == [1, 2]
    assert choose("thing", ["b", "a"], known) == [2, 1]
    with pytest.raises(LookupError, match="unknown thing 'zzz', expected one of a, b"):
        choose("thing", ["zzz"], known)


def test_the_cost_model_does_not_read_yaml() -> None:
    """The main job must start as fast as before: it has no use for the lists."""
    probe = (
        "import sys; from analysis.cost_model import cost; cost('convnet', batch=2, tune='last:2', image_size=8); "
        "print({'yaml', 'experiments.ledger.explain'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "set()"
