"""Old import paths, which stay for one release: ``import lance_ref.tensor`` gives :mod:`lance_ref.engine.tensor`."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Mapping, Sequence
from importlib.abc import Loader
from importlib.machinery import ModuleSpec
from types import CodeType, ModuleType
from typing import Any

MOVED: dict[str, str] = {
    "lance_ref.activations": "lance_ref.stores",
    "lance_ref.activations.asi": "lance_ref.stores.asi",
    "lance_ref.activations.base": "lance_ref.stores.base",
    "lance_ref.activations.core_and_factors": "lance_ref.stores.core_and_factors",
    "lance_ref.activations.gradient_filter": "lance_ref.stores.gradient_filter",
    "lance_ref.activations.hosvd": "lance_ref.stores.hosvd",
    "lance_ref.activations.lance": "lance_ref.stores.lance",
    "lance_ref.activations.quantized": "lance_ref.stores.quantized",
    "lance_ref.activations.sketch": "lance_ref.stores.sketch",
    "lance_ref.asi_ranks": "lance_ref.lance.asi_ranks",
    "lance_ref.autograd": "lance_ref.engine.autograd",
    "lance_ref.calibration": "lance_ref.lance.calibration",
    "lance_ref.calibration_file": "lance_ref.lance.calibration_file",
    "lance_ref.checkpoint": "lance_ref.train.checkpoint",
    "lance_ref.compression": "lance_ref.lance.compression",
    "lance_ref.continual.patches": "lance_ref.lance.patches",
    "lance_ref.counting": "lance_ref.engine.counting",
    "lance_ref.datasets.locate": "lance_ref.datasets.fetch",
    "lance_ref.continual.replay": "lance_ref.continual.learners",
    "lance_ref.features": "lance_ref.train.features",
    "lance_ref.features_file": "lance_ref.train.features_file",
    "lance_ref.frame": "lance_ref.algebra.frame",
    "lance_ref.functional.arguments": "lance_ref.engine.arguments",
    "lance_ref.functional.blocks": "lance_ref.engine.blocks",
    "lance_ref.geometry": "lance_ref.algebra.geometry",
    "lance_ref.gradient_samples": "lance_ref.lance.gradient_samples",
    "lance_ref.grams": "lance_ref.algebra.grams",
    "lance_ref.kernels": "lance_ref.algebra.kernels.threads",
    "lance_ref.kernels_columns": "lance_ref.algebra.kernels.columns",
    "lance_ref.kernels_depthwise": "lance_ref.algebra.kernels.depthwise",
    "lance_ref.kernels_elementwise": "lance_ref.algebra.kernels.elementwise",
    "lance_ref.knapsack": "lance_ref.lance.knapsack",
    "lance_ref.listening": "lance_ref.lance.listening",
    "lance_ref.models.pixels": "lance_ref.datasets.pixels",
    "lance_ref.planning": "lance_ref.lance.planning",
    "lance_ref.projection": "lance_ref.algebra.projection",
    "lance_ref.recalibration": "lance_ref.lance.recalibration",
    "lance_ref.selection": "lance_ref.nn.selection",
    "lance_ref.subspace": "lance_ref.algebra.subspace",
    "lance_ref.tape_report": "lance_ref.engine.tape_report",
    "lance_ref.tensor": "lance_ref.engine.tensor",
    "lance_ref.tracing": "lance_ref.nn.tracing",
    "lance_ref.train.cache": "lance_ref.train.training",
    "lance_ref.training": "lance_ref.train.training",
    "lance_ref.training_cache": "lance_ref.train.training",
    "lance_ref.training_run": "lance_ref.train.run",
    "lance_ref.tucker": "lance_ref.algebra.tucker",
}
"""Old path to new path; the modules below a package moved with it."""


class MovedFinder:
    """Finds modules under their old paths, before a folder that an update left behind is taken for a package.

    Parameters
    ----------
    table : mapping of str to str
        Old path to new path.
    """

    def __init__(self, table: Mapping[str, str]) -> None:
        self.table = table

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: Any = None) -> ModuleSpec | None:
        if name not in self.table:
            return None
        return importlib.util.spec_from_loader(name, _Alias(self.table[name]))


class _Alias(Loader):
    """Loads nothing of its own: the module under the old path is the very module under the new one."""

    def __init__(self, new: str) -> None:
        self.new = new

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(self.new)
        self.spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        module.__spec__ = self.spec  # the import system has just written the old path into it

    def get_code(self, name: str) -> CodeType | None:
        """The code that ``python -m old.path`` runs."""
        spec = importlib.util.find_spec(self.new)
        loader: Any = None if spec is None else spec.loader
        code: CodeType | None = None if loader is None else loader.get_code(self.new)
        return code
