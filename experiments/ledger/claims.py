"""What came of everything that the papers claim: ``python -m experiments.ledger.claims``.

Prints a line for each claim, and for each question that reviewers asked in public: its name, one of four verdicts, and
our figure. ``--run ID`` computes one again and says where it stands, with which command it was found, and why the
verdict is what it is. What takes long is read from its committed result file, which carries command, seed, versions and
machine. Where that file is not there, the verdict is "not run here".
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from analysis.commands import cli, command_line, names
from analysis.commands.shipped import shipped
from experiments import frame
from experiments.ledger.evidence import CHECKS, NOT_RUN, PROVENANCE, VERDICTS, Evidence, MissingEvidenceError, Outcome
from experiments.ledger.published import choose, load_entries

KINDS = ("claim", "question")
LIVE = "live"


@dataclass(frozen=True)
class Claim:
    """One line of the ledger.

    Attributes
    ----------
    kind : {"claim", "question"}
        A question's verdict is about what it doubts; ``claim`` says what that is, in our words.
    source, where : str
        A name of the file's sources, and the place there; ``quote`` is at most one short phrase.
    command : str
        That shows it, or makes the result file.
    check : str
        A function that :func:`experiments.ledger.evidence.check` has registered.
    evidence : list of str
        Result files, by name or pattern; ``["live"]`` where it is computed anew whenever it is asked for.
    verdict : str or None
        What the check must say; None while the result file is still to come.
    """

    id: str
    kind: str
    claim: str
    source: str
    where: str
    command: str
    check: str
    evidence: list[str]
    quote: str = ""
    verdict: str | None = None


@dataclass(frozen=True)
class Finding:
    """A claim and what came of it.

    ``provenance`` has command, seed, versions and machine by result file. If the evidence is ``missing``, the outcome
    says which command makes it.
    """

    claim: Claim
    outcome: Outcome
    provenance: dict[str, dict[str, Any]]
    missing: bool = False

    @property
    def as_recorded(self) -> bool:
        """Whether the ledger has this verdict, or none yet; without evidence there is nothing to compare."""
        return self.missing or self.claim.verdict in (None, self.outcome.verdict)


@lru_cache(maxsize=1)
def ledger() -> tuple[dict[str, dict[str, str]], dict[str, Claim]]:
    """Sources, and all claims by id."""
    path = shipped("claims.yaml", "experiments")
    sources, entries = load_entries(path, Claim)
    claims = {entry["id"]: Claim(**entry) for entry in entries}
    for claim in claims.values():
        if claim.kind not in KINDS or claim.verdict not in (None, *VERDICTS) or claim.verdict == NOT_RUN:
            raise ValueError(f"{path}, {claim.id}: kind or verdict is not among those that there are")
        if not isinstance(claim.evidence, list) or not claim.evidence:
            raise ValueError(f"{path}, {claim.id}: evidence must be a list of result files, or of {LIVE!r}")
        if (claim.evidence == [LIVE]) and claim.verdict is None:
            raise ValueError(f"{path}, {claim.id}: what is computed anew has a verdict")
    return sources, claims


def evaluate(claim: Claim, evidence: Evidence | None = None) -> Finding:
    """Run the check of a claim; evidence that is not there yet is said to be missing.

    Raises
    ------
    ValueError
        If there is no such check, it gives a verdict that there is not, or a result file is broken.
    """
    from experiments.ledger import checks, from_results, tasks  # noqa: F401  (which register their checks)

    evidence = Evidence() if evidence is None else evidence
    check = CHECKS.get(claim.check)
    if check is None:
        raise ValueError(f"claim {claim.id}: there is no check {claim.check!r}")
    provenance: dict[str, dict[str, Any]] = {}
    try:
        for pattern in claim.evidence:
            for name in (evidence.names(pattern) or [pattern]) if pattern != LIVE else ():
                document = evidence.results(name, claim.command)
                provenance[name] = {key: document[key] for key in PROVENANCE}
        outcome = check(evidence)
    except MissingEvidenceError as error:
        return Finding(claim, Outcome("none here", NOT_RUN, str(error)), {}, missing=True)
    except (KeyError, StopIteration) as error:
        files = ", ".join(claim.evidence)
        raise ValueError(f"claim {claim.id}: {files} lacks {names.one_line(error) or 'a row'}") from None
    if outcome.verdict not in VERDICTS:
        raise ValueError(f"claim {claim.id}: the check says {outcome.verdict!r}, expected one of {VERDICTS}")
    return Finding(claim, outcome, provenance)


# ---- printing ----------------------------------------------------------------------------------


def text(finding: Finding, detail: bool = False) -> str:
    """One claim, for a terminal or a file; ``detail`` adds where the evidence comes from."""
    claim, outcome = finding.claim, finding.outcome
    source = ledger()[0][claim.source]
    quote = f", “{claim.quote}”" if claim.quote else ""
    verdict = outcome.verdict + (f": {outcome.why}" if finding.missing else "")
    lines = [
        claim.id,
        f"  {claim.kind:<9}{claim.claim}",
        f"  source   {source['paper']}, {claim.where}{quote}",
        f"  command  {claim.command}",
        f"  figure   {outcome.figure}",
        f"  verdict  {verdict}",
    ]
    if not finding.missing:
        lines.append(f"  why      {outcome.why}")
    if detail:
        lines.append(f"  url      {source['url']}")
        for name, made in finding.provenance.items():
            versions = ", ".join(f"{package} {version}" for package, version in made["versions"].items())
            lines += [
                f"  from     experiments/results/{name}.json, seed {made['seed']}, {made['machine'].get('processor')}",
                f"           {versions}",
                f"           made by: {made['command']}",
            ]
        if claim.evidence == [LIVE] and not finding.missing:
            lines.append("  from     computed just now")
        if not finding.as_recorded:
            lines.append(f"  DIFFERS  the ledger says {claim.verdict!r}")
    return "\n".join(lines) + "\n"


def line(finding: Finding, width: int) -> str:
    """One claim on one line of at most ``width`` characters: verdict, name, and our figure as far as there is room."""
    size = max(map(len, (*VERDICTS, NOT_RUN)))
    whole = f"{finding.outcome.verdict:<{size}}  {finding.claim.id}: {finding.outcome.figure}"
    return whole if len(whole) <= width else f"{whole[: width - 3].rstrip()}..."


def to_json(finding: Finding) -> dict[str, Any]:
    """Everything, for machines."""
    claim, outcome = finding.claim, finding.outcome
    return {
        "id": claim.id,
        "kind": claim.kind,
        "claim": claim.claim,
        "source": {**ledger()[0][claim.source], "where": claim.where, "quote": claim.quote},
        "command": claim.command,
        "figure": outcome.figure,
        "verdict": outcome.verdict,
        "why": outcome.why,
        "missing": finding.missing,
        "evidence": claim.evidence,
        "provenance": finding.provenance,
        "as_recorded": finding.as_recorded,
    }


def counts(findings: Sequence[Finding]) -> str:
    """How many of each verdict."""
    found = [finding.outcome.verdict for finding in findings]
    parts = ", ".join(f"{found.count(verdict)} {verdict}" for verdict in VERDICTS)
    return f"{len(findings)} claims and questions: {parts}"


def parser() -> argparse.ArgumentParser:
    p = frame.parser("experiments.ledger.claims", __doc__)
    p.add_argument(
        "--run", nargs="+", default=[], metavar="ID", help="compute these again, and say all that is known of them"
    )
    p.add_argument("--json", action="store_true", help="print everything as JSON")
    return p


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code: 1 if a verdict differs from the one in the ledger."""
    return command_line.run_command(parser, arguments, _run)


def _run(options: argparse.Namespace) -> int:
    cli.check_once(options, "run")
    evidence = Evidence()
    findings = [evaluate(claim, evidence) for claim in choose("claim", options.run, ledger()[1])]
    if options.json:
        print(json.dumps([to_json(finding) for finding in findings], indent=1, ensure_ascii=False))
    else:
        if options.run:
            print("\n".join(text(finding, detail=True) for finding in findings), end="")
        else:
            width = shutil.get_terminal_size((100, 24)).columns
            print("\n".join(line(finding, width) for finding in findings))
            print(f"\n{counts(findings)}\nlance-ref claims --run NAME says more of one: source, command, why.")
            if any(finding.missing for finding in findings):
                print(f"{NOT_RUN}: no result file in {evidence.folder}; a checkout of the project has them")
    differing = [finding.claim.id for finding in findings if not finding.as_recorded]
    if differing and not options.json and not options.run:
        print(f"verdicts that differ from the ledger: {', '.join(differing)}", file=sys.stderr)
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(command_line.run_main(main))
