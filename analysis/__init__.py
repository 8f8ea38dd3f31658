"""What a training step costs: predicted from the trace alone, then compared with what was measured.

The formulas here are derived on paper and know nothing of the implementation in ``lance_ref``;
they read the trace (:func:`lance_ref.trace`) and nothing else.
"""
