"""FAISS as this project uses it: every module here imports it from this one.

From how many queries on FAISS computes inner products as a matrix product (BLAS) is one number for
the whole process. Builds for recent CPUs set it to 128,000, which is never. It is set once, at
import, so no thread sees it change.

One core of an EPYC (Zen 3), 100,000 vectors of width 384, ms of CPU time without and with the
product: 1 query FLAT_Q1, 2 FLAT_Q2, 4 FLAT_Q4, 8 FLAT_Q8, 32 FLAT_Q32.
"""

import faiss

faiss.cvar.distance_compute_blas_threshold = 4

__all__ = ["faiss"]
