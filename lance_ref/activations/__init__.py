"""The activation store: what a layer keeps of its input for the weight gradient.

``nn.Conv2d`` and ``nn.Linear`` know nothing of compression. Each holds an :class:`ActivationStore`
in ``.store``; swapping :class:`Exact` for :class:`Lance` is an assignment. A new method is one class
here and one cost rule in ``analysis/store_rules/``.
"""

from lance_ref.activations.base import EXACT, ActivationStore, Exact
from lance_ref.activations.lance import Lance

__all__ = ["EXACT", "ActivationStore", "Exact", "Lance"]
