"""Which tokens of which blocks an image tower gives: `own`, `cls@11`, `cls@9+cls@10+mean`.

Imports no torch: programs check their command line before that.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

from data.errors import UsageError

OWN = "own"
_TERM = re.compile(r"(cls|mean)(?:@(-?\d+))?")


@dataclass(frozen=True)
class Term:
    """One of the vectors that are joined."""

    token: str
    """own: the tower's own pooling and projection. cls: the class token. mean: of the patches."""
    block: int | None = None
    """After this one, from 1 (or from the end, -1 the last), each token layer-normed without
    weights. None: after the last and the network's own norm."""

    def __str__(self) -> str:
        return self.token if self.block is None else f"{self.token}@{self.block}"


def parse_features(expression: str, what: str = "features") -> tuple[Term, ...]:
    """The terms of `expression`. Raises `UsageError`; what: the name for its message."""
    terms = []
    for text in expression.split("+"):
        found = _TERM.fullmatch(text.strip())
        if not found and text.strip() != OWN:
            raise UsageError(
                f"{what} {expression!r}: {text.strip()!r} is neither own, cls nor mean; allowed "
                "are these, cls and mean also after a block (cls@11, mean@-2), joined by +"
            )
        block = int(found[2]) if found and found[2] else None
        terms.append(Term(found[1] if found else OWN, block))
    if len({*terms}) < len(terms):
        raise UsageError(f"{what} {expression!r}: names one vector twice")
    return tuple(terms)


def resolve_features(
    expression: str, num_blocks: int, tokens: Collection[str], tower: str
) -> tuple[Term, ...]:
    """The terms with blocks counted from 1. Raises `UsageError` for what the tower does not have.

    tokens: allowed terms, of the last block (`cls`) and of any (`cls@`). tower: its name.
    """
    found = []
    for term in parse_features(expression):
        block = term.block
        if block is not None and block < 0:
            block += num_blocks + 1
        if term.token + "@" * (block is not None) not in tokens:
            named = ", ".join(f"{t}BLOCK" if t.endswith("@") else t for t in tokens)
            raise UsageError(f"features {expression!r}: {tower} has no {term}; allowed: {named}")
        if block is not None and not 1 <= block <= num_blocks:
            raise UsageError(
                f"features {expression!r}: {tower} has {num_blocks} blocks; allowed are 1 to "
                f"{num_blocks}, or -{num_blocks} to -1"
            )
        found.append(Term(term.token, block))
    if len({*found}) < len(found):
        raise UsageError(f"features {expression!r}: names one vector twice")
    return tuple(found)
