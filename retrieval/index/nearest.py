"""An exact scan for many queries at once: matrix products over blocks of the stored vectors.

FAISS reads every vector once per query. On two cores, 100,000 vectors of width 384 and 32 queries
took it 167 ms (float32) and 93 ms (float16), and this 28 ms; 8 queries take both as long.
"""

import faiss
import numpy as np
import torch
from jaxtyping import Float, Int, UInt8

MIN_QUERIES = 8
BLOCK = 4096  # vectors: their float32 copies and scores stay in a core's cache


def stored_vectors(index: faiss.Index) -> Float[np.ndarray, "n d"] | None:
    """What a flat (float32) or flat16 (float16) index holds, not copied; None for other kinds."""
    float16 = faiss.ScalarQuantizer.QT_fp16
    if isinstance(index, faiss.IndexFlat):
        dtype = "f4"
    elif isinstance(index, faiss.IndexScalarQuantizer) and index.sq.qtype == float16:
        dtype = "f2"
    else:
        return None
    codes = faiss.rev_swig_ptr(index.codes.data(), index.ntotal * index.code_size)
    return codes.view(dtype).reshape(index.ntotal, index.d)


def pays(num_queries: int, count: int, packed: UInt8[np.ndarray, " bytes"] | None) -> bool:
    """Whether a scan of all `count` vectors is worth it; FAISS skips those that `packed` lacks."""
    chosen = count if packed is None else int(np.bitwise_count(packed).sum())
    return num_queries * chosen >= MIN_QUERIES * max(count, 1)


def scan(
    vectors: Float[np.ndarray, "n d"],
    queries: Float[np.ndarray, "q d"],
    k: int,
    packed: UInt8[np.ndarray, " bytes"] | None = None,
) -> tuple[Float[np.ndarray, "q k"], Int[np.ndarray, "q k"]]:
    """(similarities, rows) of the k largest inner products, best first; -1 where there are fewer.

    packed: a bit per vector, little end first; only the set ones can be found.
    """
    held, wanted = torch.from_numpy(vectors), torch.from_numpy(queries).T.contiguous()
    allowed = None
    if packed is not None:
        bits = np.unpackbits(packed, count=len(vectors), bitorder="little")
        allowed = torch.from_numpy(bits).bool()
    values, rows = [], []
    for start in range(0, len(vectors), BLOCK):
        scores = held[start : start + BLOCK].float() @ wanted
        if allowed is not None:
            scores[~allowed[start : start + BLOCK]] = -torch.inf
        best = scores.topk(min(k, len(scores)), dim=0)
        values.append(best.values)
        rows.append(best.indices + start)
    similarities, places = torch.cat(values).topk(min(k, len(vectors)), dim=0)
    found = torch.cat(rows).gather(0, places).masked_fill_(similarities == -torch.inf, -1)
    out = np.full((len(queries), k), -np.inf, np.float32), np.full((len(queries), k), -1)
    for whole, part in zip(out, (similarities, found), strict=True):
        whole[:, : len(part)] = part.T.numpy()
    return out
