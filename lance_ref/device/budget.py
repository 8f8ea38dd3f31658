"""Bytes as people write them."""

from __future__ import annotations

import re

_UNITS = {"b": 1, "": 1, "kib": 2**10, "mib": 2**20, "gib": 2**30, "kb": 10**3, "mb": 10**6, "gb": 10**9}


def parse_bytes(text: int | str) -> int:
    """Bytes of ``262144`` or ``"256KiB"``.

    Raises
    ------
    ValueError
        If it is not a positive number of bytes.

    Examples
    --------
    >>> parse_bytes("256KiB"), parse_bytes(1000), parse_bytes("1.5 MB")
    (262144, 1000, 1500000)
    """
    if isinstance(text, int) and not isinstance(text, bool) and text > 0:
        return text
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]*)\s*", str(text).lower()) if isinstance(text, str) else None
    if match and match[2] in _UNITS and float(match[1]) > 0:
        return int(float(match[1]) * _UNITS[match[2]])
    raise ValueError(f"budget is {text!r}, expected a positive number of bytes such as 262144 or 256KiB")


def shown_bytes(nbytes: int) -> str:
    """KiB, or MiB from 10 MiB on.

    >>> shown_bytes(242381)
    '236.7 KiB'
    """
    return f"{nbytes / 2**20:,.1f} MiB" if nbytes >= 10 * 2**20 else f"{nbytes / 2**10:,.1f} KiB"
