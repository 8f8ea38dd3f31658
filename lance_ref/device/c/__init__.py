"""A device program in C: tables and constants are written, the code that runs them is the same for every network."""

from lance_ref.device.c.folder import Exported, export

__all__ = ["Exported", "export"]
