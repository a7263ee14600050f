"""FAISS as this project uses it: every module here imports it from this one.

FAISS computes inner products as a matrix product (BLAS) from a process-wide threshold of queries x
width on. Builds for recent CPUs set it to 128,000: 333 queries of width 384. Here it is 4 x 384,
set once, at import, so no thread sees it change.

ms of one core (EPYC, Zen 3) for 100,000 float32 vectors of width 384:

    queries               1    2    4    8   32   128
    one after another    10   19   40   83  399  1435
    matrix product       26   27   27   31   61   145
"""

import faiss

faiss.cvar.distance_compute_blas_threshold = 4 * 384

__all__ = ["faiss"]
