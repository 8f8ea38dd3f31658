"""A training step as a program for a small device: fused instructions, and every array at a fixed address."""

from lance_ref.device.compiling import BudgetError, compile
from lance_ref.device.graph import UnsupportedError
from lance_ref.device.program import Program

__all__ = ["BudgetError", "Program", "UnsupportedError", "compile"]
