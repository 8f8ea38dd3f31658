"""The accuracies that the planner ranks by: ``python -m experiments.measured`` gathers them from the committed results.

What was measured stands in ``experiments/results``, which an installed package does not have; the rows that the planner
needs are written to ``analysis/data/measured.json``. A test compares the two.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from analysis.commands.command_line import run_main
from lance_ref.io.whole_file import write_text

RESULTS = Path(__file__).parent / "results"
TARGET = Path(__file__).parents[1] / "analysis" / "data" / "measured.json"
DATA = "CIFAR-10 (10,000 training images of 128 pixels)"
DEVICE_METHODS = {"head": "head-only", "bias": "bias-only", "bp": "bp", "lance": "lance"}
DEFAULTS: dict[str, dict[str, Any]] = {
    "lance": {"epsilon": 0.7}, "lance-mean-free": {"epsilon": 0.7}, "hosvd": {"epsilon": 0.7},
    "asi": {"epsilon": 0.7}, "gradient-filter": {"patch": 2}, "sketch": {"ratio": 0.125},
}  # fmt: skip
"""Settings with which the experiment ran the methods that the planner knows."""
METHODS = ("bp", "head-only", "bias-only", "int8", *DEFAULTS)


def gathered() -> dict[str, Any]:
    """Rows of the library's experiment at each method's own learning rate, and of the device programs."""
    rows: list[dict[str, Any]] = []
    library = json.loads((RESULTS / "finetune_cifar10.json").read_text())
    for row in library["rows"]:
        if row["recipe"] == "tuned" and row["method"] in METHODS:
            rows.append(_row("library", library, row["method"], DEFAULTS.get(row["method"], {}), row))
    for name in ("device_cifar10.json", "device_cifar10_last10.json"):
        device = json.loads((RESULTS / name).read_text())
        for row in device["rows"]:
            setting = {"update": row["update"]}
            if row["directions"] is not None:
                setting["directions"] = row["directions"]
            rows.append(_row("device", device, DEVICE_METHODS[row["method"]], setting, row))
    return {"data": DATA, "rows": rows}


def _row(
    engine: str, file: dict[str, Any], method: str, setting: dict[str, Any], row: dict[str, Any]
) -> dict[str, Any]:
    layers = int(file["settings"]["tune"].partition(":")[2])
    return {
        "engine": engine,
        "net": file["settings"]["net"],
        "method": method,
        **setting,
        "layers": 0 if method == "head-only" else layers,
        "accuracy": round(row["accuracy_mean"], 6),
        "sd": round(row["accuracy_sd"], 6),
        "seeds": len(row["seeds"]),
    }


def main() -> int:
    """Write the file anew."""
    write_text(TARGET, json.dumps(gathered(), indent=1) + "\n")
    print(f"{len(gathered()['rows'])} rows in {TARGET}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
