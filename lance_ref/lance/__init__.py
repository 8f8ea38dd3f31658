"""LANCE: calibration, compression, rank planning and recalibration of a network's layers."""
