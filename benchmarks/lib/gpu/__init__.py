"""The parts of `benchmarks/gpu.py`: each measures for a few minutes and writes its own figures."""
