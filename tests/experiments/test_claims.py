"""The ledger of claims: every claim has a verdict and evidence, and the verdicts follow from the evidence."""

from __future__ import annotations

import importlib
import json
import shlex
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_case import ROOT

from experiments.ledger import checks as claims_checks
from experiments.ledger import claims, from_results, tasks  # noqa: F401  (which register their checks)
from experiments.ledger.claims import LIVE, Claim, Finding, evaluate, ledger, main, text, to_json
from experiments.ledger.evidence import CHECKS, PROVENANCE, RESULTS, VERDICTS, Evidence
from lance_ref.io.whole_file import sealed, write_json

SOURCES, CLAIMS = ledger()
MADE = {"command": "python -m x", "seed": 0, "versions": {"numpy": "2"}, "machine": {"processor": "p"}}
NEEDED = {
    # claims
    "activation-250x", "asi-120x", "asi-flops-1.86x", "calibration-energy", "projection-negligible",
    "descent-direction", "full-rank", "flops-1.5x", "gpm-storage", "batch-mode", "accuracy-near-bp",
    "saved-70-finetuning", "saved-85-continual", "deployable",
    # questions
    "total-memory", "continual-flops", "small-batches", "angle-70", "seeds", "bwt-fwt", "domain-shift",
    "asi-same-setting", "bp-flops", "fidelity", "peak-memory", "subspace-drift",
}  # fmt: skip


@pytest.fixture(scope="module")
def findings() -> dict[str, Finding]:
    evidence = Evidence()
    return {name: evaluate(claim, evidence) for name, claim in CLAIMS.items()}


def write(folder: Path, name: str, **content: Any) -> Evidence:
    """A folder of evidence with one file."""
    write_json(folder / f"{name}.json", {**MADE, **content})
    return Evidence(folder)


def changed(name: str, folder: Path, change: Any) -> Evidence:
    """The committed file, changed."""
    document = json.loads((RESULTS / f"{name}.json").read_text())
    change(document)
    write_json(folder / f"{name}.json", document)
    return Evidence(folder)


# ---- the ledger ----------------------------------------------------------------------------


def test_every_claim_and_question_that_must_be_answered_is_there() -> None:
    """A claim that we cannot uphold could quietly be left out."""
    assert set(CLAIMS) >= NEEDED
    assert {claim.kind for claim in CLAIMS.values()} == {"claim", "question"}


def test_every_claim_has_a_verdict_that_the_evidence_gives(findings: dict[str, Finding]) -> None:
    """A verdict of the ledger that the check no longer gives, or a word that says nothing."""
    for name, finding in findings.items():
        assert finding.outcome.verdict in VERDICTS, name
        assert finding.as_recorded, text(finding)
        printed = text(finding, detail=True)
        assert "unknown" not in printed.lower(), name
        assert "\n" not in finding.outcome.why, name
        assert len(finding.outcome.why) > 20, name
        assert "nan" not in finding.outcome.figure.lower().split(), name


def test_what_is_computed_anew_is_there_without_any_file(tmp_path: Path) -> None:
    """A live claim must not lean on a result file; every other one must say which command it needs."""
    for claim in CLAIMS.values():
        if claim.evidence == [LIVE]:
            continue
        finding = evaluate(claim, Evidence(tmp_path))
        assert finding.missing
        assert finding.outcome.verdict == "not run here"
        assert finding.outcome.why == f"needs {claim.command}"
        assert f"not run here: needs {claim.command}" in text(finding)


@pytest.mark.skipif(not RESULTS.is_dir(), reason="results are not part of an installed package")
def test_committed_evidence_is_used_and_says_how_it_was_made(findings: dict[str, Finding]) -> None:
    """A verdict in the ledger whose file has gone would pass as 'not run here'."""
    for finding in findings.values():
        if finding.claim.verdict is not None:
            assert not finding.missing, finding.claim.id
        for made in finding.provenance.values():
            assert set(made) == set(PROVENANCE)
            assert made["command"].startswith("python -m analysis.")
            assert {"numpy", "python"} <= set(made["versions"])


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_the_command_of_a_claim_is_one_that_there_is(claim: Claim) -> None:
    """A reader types what the ledger says: module and options must exist."""
    python, flag, module, *options = shlex.split(claim.command)
    assert (python, flag) == ("python", "-m")
    if module == "pytest":
        assert all((ROOT / name).exists() for name in options)
    elif options != ["--help"]:
        importlib.import_module(module).parser().parse_args(options)


def test_quotes_are_short_and_sources_have_addresses() -> None:
    """A quotation is a phrase, not a passage; a source can be looked up."""
    assert all(len(claim.quote.split()) <= 8 for claim in CLAIMS.values())
    assert all(source["url"].startswith("https://") for source in SOURCES.values())


# ---- live checks, with planted faults ------------------------------------------------------------


def test_the_descent_check_needs_its_counterexamples(monkeypatch: pytest.MonkeyPatch) -> None:
    """With harmless examples alone nothing contradicts the claim: the verdict comes from the cosines."""
    from experiments.descent import cases as descent_cases

    harmless = descent_cases.FIXED_BATCH_MODE._replace(factors=(None, np.ones((1, 1))))
    monkeypatch.setattr(descent_cases, "EXAMPLES", {"harmless": harmless})
    assert CHECKS["descent_direction"](Evidence()).verdict == "reproduced"


def test_the_full_rank_check_sees_a_missing_direction(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store that loses one direction of the last mode must not pass for backpropagation."""
    from experiments.descent import cases as descent_cases

    whole = descent_cases.fixed_store

    def cut(shape: Any, factors: Any, **options: Any) -> Any:
        return whole(shape, (*factors[:-1], factors[-1][:, :-1]), **options)

    monkeypatch.setattr(descent_cases, "fixed_store", cut)
    assert CHECKS["full_rank"](Evidence()).verdict == "contradicted"


def test_the_reduction_follows_from_the_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Were PyTorch's memory to fall 300 times, the claim would be reproduced; by 100 of the inputs, contradicted."""
    bp, lance = claims_checks.main_case()
    check = CHECKS["activation_reduction"]
    for better, verdict in (
        (replace(lance, pytorch=bp.pytorch // 300), "reproduced"),
        (replace(lance, paper=bp.paper // 100), "contradicted"),
    ):
        monkeypatch.setattr(claims_checks, "main_case", lambda better=better: (bp, better))
        assert check(Evidence()).verdict == verdict


def test_a_blank_figure_of_backpropagation_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A published table had zeros there; a zero of ours must be called contradicted."""
    real = claims_checks.figures_of

    def blank(*case: Any, **more: Any) -> Any:
        figures = real(*case, **more)["bp"]
        return {"bp": replace(figures, net=replace(figures.net, grad_weight=0))}

    monkeypatch.setattr(claims_checks, "figures_of", blank)
    assert CHECKS["bp_never_blank"](Evidence()).verdict == "contradicted"


# ---- result checks on made-up files ----------------------------------------------------------------


@pytest.mark.skipif(not RESULTS.is_dir(), reason="results are not part of an installed package")
@pytest.mark.parametrize(("lost", "verdict"), [(0.01, "reproduced"), (0.04, "bounded"), (0.10, "contradicted")])
def test_the_verdict_on_accuracy_follows_the_accuracy(tmp_path: Path, lost: float, verdict: str) -> None:
    """Had LANCE been better or worse, the ledger must say so without being told."""

    def change(document: dict[str, Any]) -> None:
        rows = {row["method"]: row for row in document["rows"] if row["recipe"] == "papers"}
        rows["lance"]["accuracy_mean"] = rows["bp"]["accuracy_mean"] - lost

    evidence = changed("finetune_cifar10", tmp_path, change)
    finding = evaluate(CLAIMS["accuracy-near-bp"], evidence)
    assert finding.outcome.verdict == verdict
    assert finding.as_recorded == (verdict == CLAIMS["accuracy-near-bp"].verdict)


@pytest.mark.skipif(not RESULTS.is_dir(), reason="results are not part of an installed package")
def test_rows_that_are_not_there_yet_are_said_to_be_needed(tmp_path: Path) -> None:
    """A method that was not run must not stop the ledger, nor be judged."""

    def change(document: dict[str, Any]) -> None:
        document["rows"] = [row for row in document["rows"] if row["method"] != "asi" and row["recipe"] == "papers"]

    evidence = changed("finetune_cifar10", tmp_path, change)
    for name in ("asi-120x", "accuracy-at-best-rate"):
        finding = evaluate(CLAIMS[name], evidence)
        assert finding.missing
        assert finding.outcome.why.startswith("needs python -m experiments.finetune")


def learner(name: str, acc: float, ram: int) -> dict[str, Any]:
    seeds = [{"tasks": [{"tape_bytes": 1000, "ram_bytes": ram, "macs": 10 * ram}]}] * 3
    return {
        "learner": name, "acc_mean": acc, "acc_sd": 0.001, "bwt_mean": -0.03, "learning_accuracy_mean": acc,
        "seeds": seeds,
    }  # fmt: skip


@pytest.mark.parametrize(("gpm", "lance", "verdicts"), [
    (0.9395, 0.9350, ("reproduced", "reproduced")), (0.9250, 0.8900, ("bounded", "bounded")),
    (0.9000, 0.8000, ("contradicted", "contradicted")),
])  # fmt: skip
def test_continual_learning_is_judged_by_its_matrix(
    tmp_path: Path, gpm: float, lance: float, verdicts: tuple[str, str]
) -> None:
    """The file comes later; the judgement of it must work the day it does."""
    rows = [learner("gpm", gpm, 9000), learner("lance", lance, 200), learner("finetune", 0.97, 0)]
    small = [learner("gpm", gpm, 9000), learner("lance", lance, 8000)]
    write(tmp_path, "continual_split100", rows=small, settings={"epochs": 2})
    evidence = write(tmp_path, "continual_permuted-mnist", rows=rows)
    of = {name: evaluate(CLAIMS[name], evidence).outcome for name in CLAIMS if "continual" in CLAIMS[name].evidence[0]}
    assert (of["gpm-permuted-mnist"].verdict, of["competitive-with-gpm"].verdict) == verdicts
    assert of["forward-transfer"].verdict == "bounded"
    found = of["split-cifar100"]
    assert found.verdict == ("contradicted" if verdicts[1] == "contradicted" else "bounded"), "never more: other images"
    assert f"GPM {100 * gpm:.2f} %" in found.figure


@pytest.mark.parametrize(("ram", "saved", "verdicts"), [
    (200, "88 %", ("reproduced", "reproduced")), (8000, "10 %", ("bounded", "reproduced")),
    (11_000, "-20 %", ("bounded", "bounded")),
])  # fmt: skip
def test_the_worst_net_bounds_what_continual_learning_saves(
    tmp_path: Path, ram: int, saved: str, verdicts: tuple[str, str]
) -> None:
    """Bytes and multiply-adds against GPM: one net where LANCE saves 88 %, and another."""
    for name, of_lance in (("permuted-mnist", 200), ("split100", ram)):
        rows = [learner("gpm", 0.9, 9000), learner("lance", 0.9, of_lance)]  # beside 1000 bytes of tape
        evidence = write(tmp_path, f"continual_{name}", rows=rows)
    memory, work = (evaluate(CLAIMS[name], evidence).outcome for name in ("saved-85-continual", "continual-flops"))
    assert (memory.verdict, work.verdict) == verdicts
    assert f"KiB of tape and RAM, {saved}" in memory.figure.split(";")[1]


@pytest.mark.parametrize(("other", "verdict"), [(0.80, "reproduced"), (0.77, "bounded"), (0.60, "contradicted")])
def test_domain_shift_reads_every_file_there_is(tmp_path: Path, other: float, verdict: str) -> None:
    """Several data sets may be compared; the worst of them decides."""
    for name, accuracy in (("domain_shift", 0.80), ("domain_shift_eurosat", other)):
        names = ("same domain", "other domain", "other domain, recalibrated")
        runs = [{"variant": v, "accuracy": a} for v, a in zip(names, (0.80, accuracy, 0.79), strict=True)]
        evidence = write(tmp_path, name, runs=runs)
    finding = evaluate(CLAIMS["domain-shift"], evidence)
    assert finding.outcome.verdict == verdict
    assert set(finding.provenance) == {"domain_shift", "domain_shift_eurosat"}


def point(label: str, family: str, accuracy: float, kib: float, batch: int = 128) -> dict[str, Any]:
    return {
        "label": label, "family": family, "accuracy": accuracy, "tape_bytes": int(kib * 1024), "factor_bytes": 0,
        "batch": batch,
    }  # fmt: skip


def test_sweeps_are_compared_at_equal_bytes(tmp_path: Path) -> None:
    """More accuracy in more bytes is no argument for a mode."""
    uniform = "uniform threshold"
    points = [
        point("bp", "bp", 0.75, 900), point("head-only", "head-only", 0.69, 80),
        point("all modes 0.7", uniform, 0.71, 100), point("all modes 0.9", uniform, 0.72, 400),
        point("no batch 0.7", uniform, 0.72, 200), point("no batch 0.9", uniform, 0.72, 500),
        point("bp", "bp", 0.75, 90, 8), point("head-only", "head-only", 0.69, 8, 8),
        point("planned 50 KiB", "planned", 0.74, 50, 8), point("planned 12.5 KiB", "planned", 0.60, 12.5, 8),
        point("planned 400 KiB", "planned", 0.76, 400, 8),
    ]  # fmt: skip
    evidence = write(tmp_path, "sweep_cifar10", points=points)
    assert evaluate(CLAIMS["batch-mode-sweep"], evidence).outcome.verdict == "bounded"  # one of two thresholds
    small = evaluate(CLAIMS["small-batch-accuracy"], evidence).outcome
    assert small.verdict == "reproduced"
    assert "74.0 % in 50 KiB" in small.figure
    evidence = write(tmp_path, "sweep_eurosat", points=[{**each, "batch": 128} for each in points[:4]])
    assert evaluate(CLAIMS["accuracy-second-data"], evidence).outcome.verdict == "bounded"


def test_evidence_that_does_not_say_how_it_was_made_is_none(tmp_path: Path) -> None:
    """A file without command, seed, versions or machine proves nothing; nor does half a file."""
    claim = CLAIMS["domain-shift"]
    for content, named in (
        (json.dumps(sealed({})), "lacks command, seed, versions, machine"),
        (json.dumps(sealed({key: value for key, value in MADE.items() if key != "seed"})), "lacks seed"),
        ("[]", "expected a JSON object"),
        ('{"command"', "is no JSON"),
        (json.dumps(MADE), "has no checksum"),
        (json.dumps(sealed({**MADE, "runs": []})), "lacks"),
    ):
        (tmp_path / "domain_shift.json").write_text(content)
        with pytest.raises(ValueError, match=named):
            evaluate(claim, Evidence(tmp_path))


# ---- command line --------------------------------------------------------------------------


def test_one_claim_is_computed_again(capsys: pytest.CaptureFixture[str]) -> None:
    """The user doubts a line: figure, verdict, why and where from, for that line alone."""
    assert main(["--run", "full-rank", "seeds"]) == 0
    printed = capsys.readouterr().out
    for word in ("claim", "source", "command", "figure", "verdict", "why", "computed just now", "made by: python -m"):
        assert word in printed
    assert "activation-250x\n" not in printed


def test_json_has_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    """Machines read the same ledger."""
    assert main(["--run", "bwt-fwt", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found == to_json(evaluate(CLAIMS["bwt-fwt"]))
    assert found["verdict"] == "reproduced"
    assert found["source"]["url"] == SOURCES["reviews"]["url"]


def test_an_unknown_claim_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    """A slip of the pen is answered in one line that helps, with exit code 2."""
    with pytest.raises(SystemExit) as stopped:
        main(["--run", "activation-205x"])
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "activation-250x" in message


def test_a_verdict_that_differs_is_exit_1(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """A ledger that says what its check does not must fail where it is run by a machine."""
    wrong = deepcopy(CLAIMS["bwt-fwt"])
    monkeypatch.setattr(claims, "ledger", lambda: (SOURCES, {"bwt-fwt": replace(wrong, verdict="contradicted")}))
    assert main(["--run", "bwt-fwt"]) == 1
    assert "DIFFERS  the ledger says 'contradicted'" in capsys.readouterr().out
    assert main([]) == 1
    both = capsys.readouterr()
    assert "bwt-fwt" in both.err
    assert "1 claims and questions: 1 reproduced" in both.out


def test_a_claim_without_a_check_is_an_error() -> None:
    """A claim that names a check that there is not must not get a verdict."""
    with pytest.raises(ValueError, match="no check 'guess'"):
        evaluate(replace(CLAIMS["bwt-fwt"], check="guess"))


def test_every_check_serves_a_claim() -> None:
    """A check that no claim names would never run."""
    assert set(CHECKS) == {claim.check for claim in CLAIMS.values()}
