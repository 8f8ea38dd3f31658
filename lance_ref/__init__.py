"""Low-rank activation compression for on-device training, with every byte and every multiply-add accounted for."""

import sys

from lance_ref.io import stopping as _stopping  # noqa: F401  isort: skip  (first: Ctrl-C during the imports below)
from lance_ref import datasets, functional, models, nn, optim
from lance_ref import functional as F
from lance_ref import stores as activations
from lance_ref.algebra import tucker
from lance_ref.algebra.subspace import Subspace
from lance_ref.convert.torch_module import from_torch
from lance_ref.engine.autograd import no_grad
from lance_ref.engine.counting import count_macs
from lance_ref.engine.tape_report import tape
from lance_ref.engine.tensor import Tensor
from lance_ref.lance.calibration import Calibration, calibrate
from lance_ref.lance.compression import attach, compress, restore
from lance_ref.lance.gradient_samples import sample_gradients
from lance_ref.lance.planning import plan_ranks
from lance_ref.lance.recalibration import Recalibrator
from lance_ref.moved import MOVED, MovedFinder
from lance_ref.nn.fusing import fuse
from lance_ref.nn.init import manual_seed
from lance_ref.nn.selection import tune
from lance_ref.nn.subspace import merge
from lance_ref.nn.tracing import record, trace
from lance_ref.train import checkpoint, training
from lance_ref.train.training import evaluate, fit

__version__ = "0.1.0"

sys.meta_path.insert(0, MovedFinder(MOVED))  # old import paths, for one release

__all__ = [
    "Calibration",
    "F",
    "Recalibrator",
    "Subspace",
    "Tensor",
    "activations",
    "attach",
    "calibrate",
    "checkpoint",
    "compress",
    "count_macs",
    "datasets",
    "evaluate",
    "fit",
    "from_torch",
    "functional",
    "fuse",
    "manual_seed",
    "merge",
    "models",
    "nn",
    "no_grad",
    "optim",
    "plan_ranks",
    "record",
    "restore",
    "sample_gradients",
    "tape",
    "trace",
    "training",
    "tucker",
    "tune",
]
