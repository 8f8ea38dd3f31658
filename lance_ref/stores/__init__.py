"""The activation store: what a layer keeps of its input for the weight gradient.

Layers with weights know nothing of compression. Each holds an :class:`ActivationStore` in ``.store``; swapping
:class:`Exact` for :class:`Lance` is an assignment. A new method is one class here and one cost rule in
``analysis/rules/stores/``.
"""

from lance_ref.stores.asi import Asi
from lance_ref.stores.base import EXACT, ActivationStore, Exact
from lance_ref.stores.gradient_filter import GradientFilter
from lance_ref.stores.hosvd import Hosvd
from lance_ref.stores.lance import Lance
from lance_ref.stores.quantized import Quantized
from lance_ref.stores.sketch import Sketch

__all__ = ["EXACT", "ActivationStore", "Asi", "Exact", "GradientFilter", "Hosvd", "Lance", "Quantized", "Sketch"]
