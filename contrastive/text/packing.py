"""Texts one after another as one sequence, without padding: a batch costs what its texts are long.

Each token attends to its own text alone (`contrastive.varlen`), which transformers calls as an
attention implementation of its own name. For towers whose positions are numbers that
can be given, and whose pooling is ours.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from contrastive.distributed import send
from contrastive.text.config import Pooling
from contrastive.varlen import attend_within
from data.token_ids import TokenIds

ATTENTION = "flexilit_packed"  # its name among transformers' attention implementations


@dataclass(frozen=True)
class PackedTokens:
    """The n token ids of m texts in one row; text i is `ids[bounds[i] : bounds[i + 1]]`."""

    ids: Int[Tensor, " n"]  # int32, as are the bounds
    bounds: Int[Tensor, " bounds"]
    longest: int  # tokens of the longest text

    @classmethod
    def of(cls, ids: TokenIds) -> "PackedTokens":
        bounds = ids.offsets - ids.offsets[0]
        values = ids.values[ids.offsets[0] : ids.offsets[-1]]
        longest = int(ids.lengths.max())
        return cls(torch.from_numpy(values), torch.from_numpy(bounds.astype("int32")), longest)

    def to(self, device: torch.device | str) -> "PackedTokens":
        """In one copy, for which the processor does not wait."""
        both = send(torch.cat([self.ids, self.bounds]), device)
        ids, bounds = both.split([len(self.ids), len(self.bounds)])
        return PackedTokens(ids, bounds, self.longest)

    def __len__(self) -> int:
        """How many texts."""
        return len(self.bounds) - 1

    @cached_property
    def lengths(self) -> Int[Tensor, " m"]:
        return self.bounds.diff()

    @cached_property
    def positions(self) -> Int[Tensor, " n"]:
        """Of each token in its text, from 0; int64."""
        n = len(self.ids)  # told, so that no one waits for the GPU to count
        firsts = self.bounds[:-1].long().repeat_interleave(self.lengths, output_size=n)
        return torch.arange(n, device=self.ids.device) - firsts


def first_position(config: Any) -> int | None:
    """The number of a text's first position in a network of transformers; None where its texts
    cannot be packed: other positions than absolute ones, dropout within attention, or heads of a
    width that the kernel does not take."""
    if config.model_type in ("bert", "distilbert", "electra"):
        first = 0
    elif config.model_type in ("roberta", "xlm-roberta", "camembert"):
        first = int(config.pad_token_id) + 1
    else:
        return None
    absolute = getattr(config, "position_embedding_type", "absolute") == "absolute"
    dropouts = ("attention_probs_dropout_prob", "attention_dropout")
    dropout = any(getattr(config, name, 0) for name in dropouts)
    fits = config.hidden_size // config.num_attention_heads % 8 == 0
    decoder = getattr(config, "is_decoder", False)
    return first if absolute and fits and not dropout and not decoder else None


def read_packed(net: Any, tokens: PackedTokens, first_position: int) -> Float[Tensor, "n w"]:
    """The last layer's vector of each token. `net` attends by `ATTENTION` (`register`)."""
    out = net(
        input_ids=tokens.ids[None],
        position_ids=tokens.positions[None] + first_position,
        cu_seq_lens_q=tokens.bounds,
        max_length_q=tokens.longest,
    )
    return out.last_hidden_state[0]


def compiled_blocks(net: Any) -> Callable[..., Any]:
    """The blocks of `net` by torch.compile, for any number of texts and tokens (`blocks_by`).

    The kernels follow from the blocks and the first call alone, not from timings, and what is
    random is drawn as without, so that a run can be resumed bit for bit. Embeddings stay out: their
    compiled gradients are sums in no fixed order.
    """
    # torch.compile reads .grad of what comes from the embeddings, which warns
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
    options: dict[str, Any] = {"deterministic": True, "fallback_random": True}
    return torch.compile(_blocks(net)._call_impl, dynamic=True, options=options)


@contextmanager
def blocks_by(net: Any, compiled: Callable[..., Any] | None) -> Iterator[None]:
    """Within, the blocks of `net` are run by `compiled`; None: as they are."""
    if compiled is None:
        yield
        return
    blocks = _blocks(net)
    blocks._compiled_call_impl = compiled  # as `nn.Module.compile` does
    try:
        yield
    finally:
        blocks._compiled_call_impl = None


def _blocks(net: Any) -> Any:
    return net.transformer if net.config.model_type == "distilbert" else net.encoder


def pool_packed(
    vectors: Float[Tensor, "n w"], tokens: PackedTokens, pooling: Pooling
) -> Float[Tensor, "m w"]:
    """One vector per text: of its first token, of its last, or the mean of all."""
    if pooling == "cls":
        return vectors[tokens.bounds[:-1]]
    if pooling == "eos":
        return vectors[tokens.bounds[1:] - 1]
    return torch.segment_reduce(vectors, "mean", lengths=tokens.lengths, unsafe=True)


def register() -> None:
    """Make `ATTENTION` known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _attention)


def _attention(
    module: nn.Module,
    query: Float[Tensor, "1 h n w"],
    key: Float[Tensor, "1 h n w"],
    value: Float[Tensor, "1 h n w"],
    attention_mask: None,
    *,
    cu_seq_lens_q: Int[Tensor, " bounds"],
    max_length_q: int,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Float[Tensor, "1 n h w"], None]:
    """`attend_within` as transformers calls it."""
    q, k, v = (part[0].transpose(0, 1) for part in (query, key, value))
    return attend_within(q, k, v, cu_seq_lens_q, max_length_q, scaling)[None], None
