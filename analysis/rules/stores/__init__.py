"""One cost rule per activation store; importing this package registers them all."""

from analysis.rules.stores import gradient_filter, lance, patches, quantized, sketch, tucker
from analysis.rules.stores.base import STORES, StoreCost, StoreRule, conv_sizes, store_rule

__all__ = [
    "STORES",
    "StoreCost",
    "StoreRule",
    "conv_sizes",
    "gradient_filter",
    "lance",
    "patches",
    "quantized",
    "sketch",
    "store_rule",
    "tucker",
]
