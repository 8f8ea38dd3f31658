"""The most bytes that are alive at a time, simulated over the trace and measured."""
