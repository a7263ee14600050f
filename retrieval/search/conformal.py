"""Promises that need no model of the data, only that examples and what comes later are alike
(exchangeable): how likely a score is, and how many candidates lose how little. Pure numpy."""

import numpy as np
from jaxtyping import Float, Int


def p_values(
    scores: Float[np.ndarray, " q"], examples: Float[np.ndarray, " n"]
) -> Float[np.ndarray, " q"]:
    """The share of examples, the asked one among them, that score as low or lower: in (0, 1].

    Of a score that is exchangeable with the examples', it is at most r with probability at most r
    (Vovk et al., Algorithmic Learning in a Random World, 2005, section 2.2). NaN where a score is.
    """
    ordered = np.sort(examples)
    lower = np.searchsorted(ordered, scores, side="right")
    return np.where(np.isnan(scores), np.nan, (1 + lower) / (1 + len(ordered)))


def losses(
    ranks: Int[np.ndarray, "n k"], candidates: Int[np.ndarray, " c"]
) -> Float[np.ndarray, "n c"]:
    """Per query, the share of its k fine answers that are missing among so many candidates.

    ranks: the place, from 0, of each fine answer among the query's candidates.
    """
    return (ranks[:, :, None] >= candidates[None, None]).mean(axis=1)


def fewest_candidates(ranks: Int[np.ndarray, "n k"], lost: float) -> int | None:
    """The fewest candidates whose expected loss is at most `lost`, a share; None where so few
    queries cannot promise it.

    Conformal risk control (arXiv:2208.02814, equation 4) with losses of at most 1: their mean over
    the queries and one more, which loses everything, is at most `lost`.
    """
    count = len(ranks)
    allowed = (lost * (count + 1) - 1) * ranks.shape[1]  # answers that may be missing, in all
    if allowed < 0 or not count:
        return None
    deepest = np.sort(ranks, axis=None)[::-1]  # those that more candidates find last
    first_lost = int(np.floor(allowed + 1e-9))
    return int(deepest[first_lost]) + 1 if first_lost < len(deepest) else 1
