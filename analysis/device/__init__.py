"""What a training step takes on a device: RAM, flash and multiply-adds, from shapes alone.

The formulas are derived from what the instructions are to do, and know nothing of the arrays of
:mod:`lance_ref.device`; :mod:`analysis.device.check` compares.
"""
