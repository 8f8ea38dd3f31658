"""A conformance kit: does another implementation compute what the papers define?

``python -m lance_ref.conformance --write DIR`` writes small cases as ``.npz`` and JSON, and
``python -m lance_ref.conformance --check pkg.module:adapter`` runs somebody's functions over them.
``docs/conformance.md`` specifies the files and the functions.

* :mod:`~lance_ref.conformance.definitions` computes what is expected, as sums written out;
* :mod:`~lance_ref.conformance.layer_cases`, :mod:`~lance_ref.conformance.subspace_cases`: the cases;
* :mod:`~lance_ref.conformance.files`: the folder; :mod:`~lance_ref.conformance.checking`: adapters run over the cases;
  :mod:`~lance_ref.conformance.table`: what is printed;
* :mod:`~lance_ref.conformance.numpy_adapter`: this library as an adapter.
"""

from lance_ref.conformance.case import Case, Check
from lance_ref.conformance.checking import Outcome, check, load_adapter
from lance_ref.conformance.files import Kit, load_kit, make_kit, write_kit

__all__ = ["Case", "Check", "Kit", "Outcome", "check", "load_adapter", "load_kit", "make_kit", "write_kit"]
