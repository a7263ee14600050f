"""What the benchmarks share. Each program beside this folder is one measurement."""
