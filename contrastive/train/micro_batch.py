"""How many texts go through the text tower at once, and compiling it for as many."""

import torch

from contrastive import distributed
from contrastive.model.lit import LitModel
from contrastive.model.loss import Positives, loss_share
from contrastive.run.zero import largest_divisor
from contrastive.text.encoder import TextVectors
from contrastive.text.packing import PackedTokens
from contrastive.text.padding import TokenBatch
from contrastive.text.tower import TextTower
from contrastive.train.step import packs_texts
from data.progress import say_once
from data.token_ids import TokenIds

CPU_TEXTS = 256  # texts; more are no faster on a CPU and only cost memory
FREE_SHARE = 0.8  # of the GPU's free memory that activations may take
OPTIMIZER_BYTES = 16  # per parameter: gradient, two moments, DeepSpeed's buffers


def find_micro_batch_size(
    model: LitModel,
    global_batch_size: int,
    dtype: torch.dtype,
    captions_per_image: int = 1,
    cached_texts: bool = False,
) -> int:
    """The most texts per forward that fit on every rank; divides a rank's share of the batch.

    dtype: of the linear layers. cached_texts: no step runs the text tower. On a GPU the memory of
    two small micro-batches of longest texts is measured and extrapolated.
    """
    per_rank = global_batch_size // distributed.world_size() * captions_per_image
    if distributed.device().type == "cpu":
        return largest_divisor(per_rank, CPU_TEXTS)
    texts = (_longest(model, number, dtype, cached_texts) for number in (32, 96))
    small, large = (_peak_bytes(model, some, global_batch_size, dtype) for some in texts)
    per_text = max(1.0, (large - small) / 64)
    free, _ = torch.cuda.mem_get_info()
    parameters = sum(p.numel() for p in model.trained.parameters() if p.requires_grad)
    room = FREE_SHARE * free - OPTIMIZER_BYTES * parameters - (small - 32 * per_text)
    fits = torch.tensor([room / per_text], device=distributed.device())
    return largest_divisor(per_rank, max(1, int(distributed.all_gather(fits).min())))


def _longest(
    model: LitModel, num_texts: int, dtype: torch.dtype, cached: bool
) -> TokenBatch | PackedTokens | TextVectors:
    """Texts of full length as a step reads them, on this rank's device. cached: as vectors."""
    tower, device = model.text.encoder.tower, distributed.device()
    if cached:
        return TextVectors(torch.ones(num_texts, tower.width)).to(device)
    texts = TokenIds.of([_long_text(tower)] * num_texts)
    packed = packs_texts(tower, device, dtype)
    return (PackedTokens.of(texts) if packed else TokenBatch.of(tower, texts)).to(device)


def _long_text(tower: TextTower) -> list[int]:
    return tower.tokenizer(["word " * tower.tokenizer.context_length])[0]


def compile_texts(model: LitModel, micro_batch_size: int, dtype: torch.dtype) -> bool:
    """Compile the text tower where its texts are packed. Returns whether it is, on all ranks alike.

    Compiled for a micro-batch that follows from the tower and the size alone, not for the first of
    the data, so that a resumed run has the same kernels. To be called once DeepSpeed has laid the
    parameters where they stay, whose alignment in memory kernels are made for, and below ZeRO 3,
    which gathers and frees parameters within the network.
    """
    tower = model.text.encoder.tower
    packed = packs_texts(tower, distributed.device(), dtype)
    if not packed or torch._dynamo.config.disable:  # TORCHDYNAMO_DISABLE=1
        return False
    ids = _long_text(tower)
    shares = (ids[: 1 + number % len(ids)] for number in range(micro_batch_size))
    tokens = PackedTokens.of(TokenIds.of(list(shares))).to(distributed.device())
    failure = ""
    try:
        tower.compile_packed()
        _trial(model, tokens, micro_batch_size, dtype)
        if model.text.loss.kind == "softmax":  # which first reads several micro-batches
            with torch.no_grad(), autocast(dtype):
                model.text(tokens)
    except Exception as error:  # a compiler is missing, or one that fails: it is only for speed
        failure = f"{type(error).__name__}: {error}".splitlines()[0]
    failed = torch.tensor([float(bool(failure))], device=distributed.device())
    if not distributed.all_gather(failed).any():
        return True
    tower.compile_packed(False)
    if failure:
        say_once(f"texts are read without torch.compile, more slowly: {failure}")
    return False


def _peak_bytes(
    model: LitModel,
    tokens: TokenBatch | PackedTokens | TextVectors,
    num_images: int,
    dtype: torch.dtype,
) -> int:
    """Peak memory of a trial."""
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    _trial(model, tokens, num_images, dtype)
    return torch.cuda.max_memory_allocated() - before


def _trial(
    model: LitModel,
    tokens: TokenBatch | PackedTokens | TextVectors,
    num_images: int,
    dtype: torch.dtype,
) -> None:
    """A forward and backward over these texts, and with a head over a rank's share of the images.
    Leaves no gradients, nor tells DeepSpeed of any."""
    device = distributed.device()
    side, head = model.text, model.head
    width = side.encoder.projection.out_features
    images = torch.zeros(num_images, width, device=device, dtype=dtype)
    labels = torch.arange(num_images, device=device)
    slopes = torch.zeros_like(images, dtype=torch.float32) if head else None
    with autocast(dtype):
        embeds, scale, bias = side(tokens)
        own = head(images[:: distributed.world_size()].float()).sum() if head else 0
    positives = Positives(labels, torch.arange(len(embeds), device=device) % num_images)
    share = loss_share(side.loss.kind, images, embeds, positives, scale, bias, None, slopes)
    parameters = [p for p in model.trained.parameters() if p.requires_grad]
    torch.autograd.grad(share + own, parameters, allow_unused=True)
    if device.type == "cuda":
        torch.cuda.empty_cache()


def autocast(dtype: torch.dtype) -> torch.autocast:
    """As DeepSpeed's engine has it."""
    return torch.autocast(distributed.device().type, dtype, enabled=dtype == torch.bfloat16)
