"""Helpers of the benchmarks. The programs beside this folder are the measurements, and import
nothing of one another."""
