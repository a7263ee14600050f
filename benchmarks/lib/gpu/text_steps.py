"""A text tower's own best step, without this project: transformers, AdamW, tensors that are ready.

Forward, backward and update of a batch of texts, against fixed vectors in place of a loss. Padded
in one, four or eight groups of like length, or packed into one sequence, on a GPU with compiled
blocks too: what is fastest counts.
"""

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from lib.gpu.scale import CUDA, DEVICE, autocast
from lib.harness import interleave

GROUPS = (1, 4, 8)
Step = Callable[[], None]


def best_text_step(
    folder: str, ids: list[list[int]], chunk: int, rounds: int
) -> tuple[Step, dict[str, Any]]:
    """The fastest step, and what each way took. chunk: texts of one forward and backward."""
    said: dict[str, Any] = {}
    steps: dict[str, Step] = {}
    ways: dict[str, Callable[[], Step]] = {
        f"padded, {groups} groups": partial(padded_step, folder, ids, chunk, groups)
        for groups in GROUPS
    }
    ways["packed"] = partial(packed_step, folder, ids, chunk)
    if CUDA:
        ways["packed, blocks compiled"] = partial(packed_step, folder, ids, chunk, compiled=True)
    seconds = {}
    for name, make in ways.items():
        try:
            steps[name] = make()
            steps[name]()
            seconds[name] = interleave({name: steps[name]}, rounds, warmup=1).median(name)
        except Exception as error:  # no room for padding, or no kernel for packing
            said[f"{name}, not run"] = f"{type(error).__name__}: {str(error)[:160]}"
            steps.pop(name, None)
        said |= {f"{name}, pairs/s": len(ids) / seconds[name]} if name in seconds else {}
        for other in set(steps) - {min(seconds, key=seconds.__getitem__, default="")}:
            del steps[other]  # a tower and its optimiser each
        if CUDA:
            torch.cuda.empty_cache()
    best = min(seconds, key=seconds.__getitem__)
    return steps[best], said | {"best": best}


def _tower(folder: str, attention: str = "sdpa") -> tuple[Any, torch.optim.Optimizer]:
    transformers.logging.set_verbosity_error()  # the pooler, which is left out
    net = transformers.AutoModel.from_pretrained(
        folder, attn_implementation=attention, add_pooling_layer=False
    )
    net = net.to(DEVICE).train()
    return net, torch.optim.AdamW(net.parameters(), lr=1e-5, fused=CUDA)


def _chunks(ids: list[list[int]], chunk: int) -> list[list[list[int]]]:
    """Texts of like length together."""
    ordered = sorted(ids, key=len)
    return [ordered[start : start + chunk] for start in range(0, len(ordered), chunk)]


def padded_step(folder: str, ids: list[list[int]], chunk: int, groups: int) -> Step:
    """Groups of like length, each padded to its longest."""
    net, optimizer = _tower(folder)
    ready: list[list[tuple[Tensor, Tensor]]] = []
    for part in _chunks(ids, chunk):
        bounds = np.linspace(0, len(part), groups + 1).astype(int)
        made = []
        for start, stop in pairwise(bounds.tolist()):
            longest = max((len(text) for text in part[start:stop]), default=0)
            if not longest:
                continue
            table = torch.zeros(stop - start, longest, dtype=torch.long)
            mask = torch.zeros_like(table)
            for row, text in enumerate(part[start:stop]):
                table[row, : len(text)], mask[row, : len(text)] = torch.tensor(text), 1
            made.append((table.to(DEVICE), mask.to(DEVICE)))
        ready.append(made)
    target = F.normalize(torch.randn(chunk, net.config.hidden_size, device=DEVICE), dim=-1)

    def step() -> None:
        optimizer.zero_grad()
        for made in ready:
            pooled = []
            with autocast():
                for table, mask in made:
                    out = net(input_ids=table, attention_mask=mask).last_hidden_state
                    weight = mask[:, :, None].to(out.dtype)
                    pooled.append((out * weight).sum(1) / weight.sum(1))
                embeds = F.normalize(torch.cat(pooled).float(), dim=-1)
            (embeds * target[: len(embeds)]).sum().backward()
        optimizer.step()

    return step


# ---- packed --------------------------------------------------------------------------------

_bounds: list[tuple[Tensor, int]] = []  # cumulative lengths of the texts under way, the longest


def _packed_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
) -> tuple[Tensor, None]:
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.nn.attention.varlen import varlen_attn

    cumulative, longest = _bounds[0]
    q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (tokens, heads, d)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # cuDNN plans anew for every number of tokens
        out: Any = varlen_attn(q, k, v, cumulative, cumulative, longest, longest)
    return out[None], None


def packed_step(folder: str, ids: list[list[int]], chunk: int, compiled: bool = False) -> Step:
    """One sequence of all texts of a chunk, each attending to itself. compiled: blocks by torch."""
    transformers.AttentionInterface.register("packed_texts", _packed_attention)
    transformers.AttentionMaskInterface.register("packed_texts", lambda *_, **__: None)
    net, optimizer = _tower(folder, "packed_texts")
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(64, dynamo.recompile_limit)  # each layer has a number: one each
    for layer in net.encoder.layer if compiled else ():
        layer.compile(dynamic=True)
    ready: list[tuple[list[Tensor], int]] = []
    for part in _chunks(ids, chunk):
        lengths = torch.tensor([len(text) for text in part])
        cumulative = F.pad(lengths.cumsum(0), (1, 0)).int()
        tokens = torch.tensor([token for text in part for token in text])[None]
        places = torch.cat([torch.arange(len(text)) for text in part])[None]
        owner = torch.repeat_interleave(torch.arange(len(part)), lengths)
        tensors = (tokens, places, owner, cumulative, lengths[:, None])
        ready.append(([tensor.to(DEVICE) for tensor in tensors], int(lengths.max())))
    target = F.normalize(torch.randn(chunk, net.config.hidden_size, device=DEVICE), dim=-1)

    def step() -> None:
        optimizer.zero_grad()
        for (tokens, places, owner, cumulative, lengths), longest in ready:
            _bounds[:] = [(cumulative, longest)]
            with autocast():
                out = net(input_ids=tokens, position_ids=places).last_hidden_state[0]
                sums = out.new_zeros(len(lengths), out.shape[1]).index_add(0, owner, out)
                embeds = F.normalize((sums / lengths).float(), dim=-1)
            (embeds * target[: len(embeds)]).sum().backward()
        optimizer.step()

    return step
