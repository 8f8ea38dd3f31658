"""The activation store: what a layer keeps of its input for the weight gradient.

``nn.Conv2d`` and ``nn.Linear`` know nothing of compression. Each holds an :class:`ActivationStore`
in ``.store``; swapping :class:`Exact` for :class:`Lance` is an assignment. A new method is one class
here and one cost rule in ``analysis/rules/stores/``.
"""

from lance_ref.activations.asi import Asi
from lance_ref.activations.base import EXACT, ActivationStore, Exact
from lance_ref.activations.gradient_filter import GradientFilter
from lance_ref.activations.hosvd import Hosvd
from lance_ref.activations.lance import Lance
from lance_ref.activations.quantized import Quantized
from lance_ref.activations.sketch import Sketch

__all__ = ["EXACT", "ActivationStore", "Asi", "Exact", "GradientFilter", "Hosvd", "Lance", "Quantized", "Sketch"]
