"""Continual learning with task subspaces: LANCE outside of what earlier tasks need, and GPM to compare with.

:mod:`~lance_ref.continual.bases` finds what a task needs, :mod:`~lance_ref.continual.protection` keeps the next one
out of it, :mod:`~lance_ref.lance.patches` sees convolutions as linear layers over patches, and
:mod:`~lance_ref.continual.gpm` is the rival that projects every gradient.
"""

from lance_ref.continual.bases import (
    Gram,
    Protected,
    feature_gram,
    task_subspace,
    update_protected,
    update_protected_from_samples,
)
from lance_ref.continual.gpm import GPM
from lance_ref.continual.protection import TaskCompression, check_optimizer, compress_for_task, leak
from lance_ref.lance.patches import PatchLance

__all__ = [
    "GPM",
    "Gram",
    "PatchLance",
    "Protected",
    "TaskCompression",
    "check_optimizer",
    "compress_for_task",
    "feature_gram",
    "leak",
    "task_subspace",
    "update_protected",
    "update_protected_from_samples",
]
