"""The networks of the corpus: names and options in ``data/corpus.yaml``, built with random weights."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

DATA = Path(__file__).parents[1] / "data" / "corpus.yaml"
DEFAULT_BATCH = 2


@dataclass(frozen=True)
class Network:
    """One network.

    Attributes
    ----------
    package : str
        That it comes from, and that must be installed.
    name : str
        In the tables; unique in its package.
    make : str
        ``pkg.module:callable``.
    options : mapping
        Of the callable; of a class of transformers, of its configuration.
    inputs : tuple of str
        Each as ``[name=]shape[:dtype]``, without the batch.
    batch : int
        Of the real step: 2 unless something needs more.
    quick : bool
        Whether it is among those that a test runs.
    exports : bool
        Whether it is exported as ONNX where that is asked for.
    """

    package: str
    name: str
    make: str
    options: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()
    batch: int = DEFAULT_BATCH
    quick: bool = False
    exports: bool = True

    def is_installed(self) -> bool:
        """Whether its package and PyTorch are there."""
        return all(importlib.util.find_spec(package) is not None for package in ("torch", self.package))

    def build(self) -> Any:
        """The network, in training mode; the same weights every time."""
        import torch

        define_operations_without_kernels()
        module, _, attribute = self.make.partition(":")
        with warnings.catch_warnings(), torch.random.fork_rng():
            warnings.simplefilter("ignore")
            torch.manual_seed(0)
            make = getattr(importlib.import_module(module), attribute)
            options = self.options
            made = make(make.config_class(**options)) if self.package == "transformers" else make(**options)
        return made.train()


def networks(path: Path = DATA) -> list[Network]:
    """All networks of the list."""
    import yaml

    listed = yaml.safe_load(path.read_text(encoding="utf-8"))
    found = []
    for package, of in listed.items():
        for name, entry in of["networks"].items():
            given = {"make": of.get("make") or f"{of['module']}:{name}", **of.get("defaults", {}), **(entry or {})}
            named = {of["named"]: name} if "named" in of else {}  # of one function for all, which takes the name
            given["options"] = {**named, **of.get("options", {}), **given.get("options", {})}
            found.append(Network(package, name, **{**given, "inputs": tuple(given["inputs"])}))
    return found


def define_operations_without_kernels() -> None:
    """Names that torchvision registers functions for, where its compiled part does not fit PyTorch's build.

    The wheel of the package index is built for CUDA; without these names it cannot be imported beside a PyTorch for
    CPUs, nor can the other packages, which import it. None of the networks of the corpus calls them.
    """
    import torch

    for name in ("nms", "qnms"):
        try:
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        except RuntimeError:  # defined already
            return
