"""Old import paths of the cost model and the experiments, which stay for one release."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from typing import Any

MOVED: dict[str, str] = {
    "analysis.account": "analysis.rules.account",
    "analysis.adapt": "experiments.adapt",
    "analysis.batch_law": "analysis.ranks.batch_law",
    "analysis.calibration_costs": "analysis.rules.calibration_costs",
    "analysis.claims": "experiments.ledger.claims",
    "analysis.cli": "analysis.commands.cli",
    "analysis.continual": "experiments.continual.command",
    "analysis.continual_bill": "analysis.reports.continual_bill",
    "analysis.continual_cell": "experiments.continual.cell",
    "analysis.continual_costs": "analysis.reports.continual_costs",
    "analysis.continual_report": "experiments.continual.report",
    "analysis.descent": "experiments.descent.command",
    "analysis.descent_cases": "experiments.descent.cases",
    "analysis.domain_shift": "experiments.domain_shift",
    "analysis.explain": "experiments.ledger.explain",
    "analysis.figures": "analysis.reports.figures",
    "analysis.finetune": "experiments.finetune.command",
    "analysis.finetune_cell": "experiments.finetune.cell",
    "analysis.finetune_methods": "experiments.finetune.methods",
    "analysis.finetune_report": "experiments.finetune.report",
    "analysis.finetune_sweep": "experiments.finetune.sweep",
    "analysis.footnotes": "analysis.reports.footnotes",
    "analysis.ledger": "experiments.ledger",
    "analysis.ledger.accounting_rules": "experiments.ledger.accounting_rules",
    "analysis.ledger.checks": "experiments.ledger.checks",
    "analysis.ledger.evidence": "experiments.ledger.evidence",
    "analysis.ledger.from_results": "experiments.ledger.from_results",
    "analysis.ledger.published": "experiments.ledger.published",
    "analysis.ledger.tasks": "experiments.ledger.tasks",
    "analysis.ledger.yaml_file": "experiments.ledger.published",
    "analysis.measure": "analysis.check.measure",
    "analysis.method_runs": "analysis.steps.runs",
    "analysis.methods": "analysis.steps.methods",
    "analysis.nets": "analysis.steps.nets",
    "analysis.peak.methods": "analysis.reports.peaks",
    "analysis.planning": "analysis.planner",
    "analysis.planning.costs": "analysis.planner.costs",
    "analysis.planning.fidelity": "analysis.planner.fidelity",
    "analysis.planning.options": "analysis.planner.options",
    "analysis.planning.search": "analysis.planner.search",
    "analysis.planning.tables": "analysis.planner.tables",
    "analysis.plot_data": "analysis.reports.plot_data",
    "analysis.plots": "analysis.reports.plots",
    "analysis.predict": "analysis.reports.predict",
    "analysis.protection_costs": "analysis.rules.protection_costs",
    "analysis.provenance": "analysis.commands.provenance",
    "analysis.report": "analysis.reports.report",
    "analysis.spectra_file": "analysis.ranks.spectra_file",
    "analysis.step_changes": "analysis.steps.changes",
    "analysis.sweep": "analysis.commands.sweep",
    "analysis.tables": "analysis.reports.tables",
    "analysis.torch_replay": "analysis.check.torch_replay",
    "analysis.validation": "analysis.check",
    "analysis.validation.cells": "analysis.check.cells",
    "analysis.validation.table": "analysis.check.table",
}
"""Old path to new path."""


class LateFinder:
    """Asks :mod:`lance_ref.moved` once an old path is imported: commands must start without the library."""

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name not in MOVED:
            return None
        from lance_ref.moved import MovedFinder

        return MovedFinder(MOVED).find_spec(name)
