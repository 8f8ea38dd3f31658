"""The unit in which a number is written: the larger one from a tenth of it on, which three decimals still show well."""

from __future__ import annotations

BYTES = {"MiB": 2**20, "KiB": 2**10}
SCALES = ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands"))


def readable(n: int) -> str:
    """Bytes with their unit.

    >>> readable(3 * 2**19), readable(1536), readable(0)
    ('1.500 MiB', '1.500 KiB', 'nothing')
    """
    return f"{in_unit(n, unit_of(n))} {unit_of(n)}" if n else "nothing"


def unit_of(n: int) -> str:
    """The unit in which this number of bytes is written: MiB from a tenth of a MiB on, else KiB."""
    return "MiB" if 10 * n >= BYTES["MiB"] else "KiB"


def in_unit(n: int, unit: str) -> str:
    return f"{n / BYTES[unit]:,.3f}"


def scale_of(n: int) -> tuple[float, str]:
    """The scale on which this number of operations is written, and its name: billions, millions or thousands."""
    return next((scale for scale in SCALES if 10 * n >= scale[0]), SCALES[-1])
