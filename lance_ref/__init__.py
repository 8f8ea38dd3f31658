"""lance_ref: low-rank activation compression for on-device training, every byte and multiply-add accounted for."""

from lance_ref import _stopping  # noqa: F401  isort: skip  (first: Ctrl-C while a command imports what follows)
from lance_ref import activations, checkpoint, datasets, functional, models, nn, optim, training, tucker
from lance_ref import functional as F
from lance_ref.autograd import no_grad
from lance_ref.calibration import Calibration, calibrate
from lance_ref.compression import attach, compress, restore
from lance_ref.counting import count_macs
from lance_ref.gradient_samples import sample_gradients
from lance_ref.nn.init import manual_seed
from lance_ref.planning import plan_ranks
from lance_ref.recalibration import Recalibrator
from lance_ref.selection import tune
from lance_ref.subspace import Subspace
from lance_ref.tape_report import tape
from lance_ref.tensor import Tensor
from lance_ref.tracing import record, trace
from lance_ref.training import evaluate, fit

__version__ = "0.1.0"

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
    "functional",
    "manual_seed",
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
