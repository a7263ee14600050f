"""open_clip's step with a locked image tower, from page-locked memory and from its own loader."""

import time
from argparse import Namespace
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from open_clip.loss import SigLipLoss
from open_clip.tokenizer import HFTokenizer
from open_clip.transform import image_transform
from torch import Tensor

from contrastive.distributed import synchronize
from contrastive.vision.tower import VisionTower
from lib.gpu.data import captions, context
from lib.gpu.scale import CUDA, DEVICE, Scale, autocast
from lib.lit_setup import adamw, locked_open_clip


class OpenClip:
    """Its model of the same towers, AdamW, sigmoid loss. Texts are padded to the longest of a
    batch, which its own tokeniser does not do."""

    def __init__(self, scale: Scale, tower: VisionTower, text: str, mean_tokens: int) -> None:
        self._scale, self._mean_tokens, self._context = scale, mean_tokens, context(mean_tokens)
        self._model = locked_open_clip(tower, text, self._context)
        self._optimizer, self._loss = adamw(list(self._model.parameters())), SigLipLoss()
        self._tokenizer = HFTokenizer(text, context_length=self._context)

    def step(self, images: Tensor, tokens: Tensor) -> None:
        there = images.to(DEVICE, non_blocking=True), tokens.to(DEVICE, non_blocking=True)
        self._optimizer.zero_grad()
        with autocast():
            loss = self._loss(**self._model(*there))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()

    def ready(self) -> tuple[Tensor, Tensor]:
        """A batch in page-locked memory."""
        count, side = self._scale.open_clip_batch, self._scale.image_size
        texts = captions(count, self._mean_tokens, self._scale.vocabulary, seed=2)
        tokens, images = _trimmed(self._tokenizer(texts)), torch.rand(count, 3, side, side)
        return (images.pin_memory(), tokens.pin_memory()) if CUDA else (images, tokens)

    def from_its_loader(self, shards: Sequence[str]) -> dict[str, Any]:
        """Pairs/s from JPEG tars, as its training reads them, once what workers hold ready is used
        up; or why it was not run."""
        try:
            batches = self._batches(shards)
            for _ in range(2 * self._scale.workers + 2):
                self._of_loader(batches)
            start = time.perf_counter()
            for _ in range(2 * self._scale.rounds):
                self._of_loader(batches)
            seconds = (time.perf_counter() - start) / (2 * self._scale.rounds)
        except Exception as error:  # no room for its float32 pixels among them
            return {"not run": f"{type(error).__name__}: {str(error)[:160]}"}
        return {"pairs_per_s": self._scale.open_clip_batch / seconds}

    def _of_loader(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        images, tokens = next(batches)
        self.step(images, _trimmed(tokens))
        synchronize()

    def _batches(self, shards: Sequence[str]) -> Iterator[tuple[Tensor, Tensor]]:
        from open_clip_train import data as loading
        from webdataset.tariterators import tar_file_expander

        (pattern,), scale = shards, self._scale
        told = Namespace(
            train_data=pattern.replace("*", f"{{0000..{scale.tars - 1:04d}}}"),
            train_num_samples=10**9,  # more than are asked for; shards are drawn again and again
            train_data_upsampling_factors=None,
            dataset_resampled=True,
            batch_size=scale.open_clip_batch,
            workers=scale.workers,
            world_size=1,
            seed=0,
        )
        transform = image_transform(scale.image_size, is_train=True)
        # webdataset 1.0 marks the end of a tar, which open_clip 3.3 takes for a file
        loading.tar_file_expander = partial(tar_file_expander, eof_value=None)
        made = loading.get_wds_dataset(told, transform, True, tokenizer=self._tokenizer)
        return iter(made.dataloader)


def _trimmed(tokens: Tensor) -> Tensor:
    """Without columns of padding alone."""
    return tokens[:, : int((tokens != 0).sum(1).max())]
