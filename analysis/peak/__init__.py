"""The most bytes that are alive at a time, simulated over the trace and measured."""

from analysis.peak import layers, more_rules, moving, norms, tucker  # noqa: F401  (they register their rules)
