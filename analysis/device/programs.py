"""Which methods a device has, and why it lacks the others."""

from __future__ import annotations

DEVICE_METHODS = {"bp": "bp", "head-only": "head", "bias-only": "bias", "lance": "lance", "lance-mean-free": "lance"}
"""The method of :func:`lance_ref.device.compile` for each method of the cost model that has one."""

WHY_NOT = {
    "lance-center": "a device keeps no mean beside a core",
    "hosvd": "it decomposes each batch, and a device sees one image at a time",
    "asi": "its subspaces follow each batch, and those of a device are fixed",
    "gradient-filter": "a device computes exact input gradients",
    "int8": "a device keeps inputs as numbers, without codes",
    "int4": "a device keeps inputs as numbers, without codes",
    "sketch": "it combines the images of a batch, and a device sees one at a time",
    "checkpoint": "a device runs no block a second time",
    "micro-batch": "a device sees one image at a time anyway",
    "lora": "a device adds D in fixed directions to a weight, and no other adapter",
}


def why_not(method: str) -> str:
    """Why a device has no program of a method; empty if it has one.

    >>> why_not("lance"), why_not("hosvd")
    ('', 'it decomposes each batch, and a device sees one image at a time')
    """
    return "" if method in DEVICE_METHODS else WHY_NOT.get(method, "it was added by another package")
