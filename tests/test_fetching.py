"""Work one batch ahead: the same results, and nothing in between for which a GPU waits. (With a
stand-in for a GPU: what streams do is not tried.)"""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import gpu_stand_in
import pytest
import torch
from conftest import TINY_TOWER
from gpu_stand_in import Gpu
from torch import Tensor
from torch.utils._pytree import tree_leaves

from contrastive import LitModel, load_vision_tower
from contrastive.fetching import one_ahead
from contrastive.image_features import compute_features, start_features
from data.batch import Cut, EvalBatch, ShapedImages
from retrieval.embed.encode import embed_batches

SIZES = (48, 30)


def batch(seed: int, shaped: bool = False) -> EvalBatch:
    """Three images; shaped: of two shapes, for the first patch size."""
    draw = torch.Generator().manual_seed(seed)

    def pixels(*shape: int) -> Tensor:
        return torch.randint(256, shape, dtype=torch.uint8, generator=draw)

    numbers = torch.arange(3)
    made = EvalBatch(["a", "b", "c"], None, [()] * 3, numbers, 0, numbers, numbers, numbers)
    if shaped:
        shapes = ((240, 144), (144, 240), (144, 240))
        cuts = [
            (Cut(height, width, SIZES[0]), pixels(3, height, width)) for height, width in shapes
        ]
        made.shaped = [ShapedImages.of(cuts)]
    else:
        made.images = pixels(3, 3, 240, 240)
    return made


class Work:
    """Numbers as items, and what happens to them, in order."""

    def __init__(self, count: int, bad_start: int = -1, bad_wait: int = -1) -> None:
        self.count, self.bad_start, self.bad_wait = count, bad_start, bad_wait
        self.log: list[str] = []

    def __iter__(self) -> Iterator[tuple[int, Callable[[], int]]]:
        for number in range(self.count):
            if number == self.bad_start:
                raise ValueError(number)
            self.log.append(f"start {number}")
            yield number, lambda number=number: self._wait(number)

    def _wait(self, number: int) -> int:
        self.log.append(f"wait {number}")
        if number == self.bad_wait:
            raise ValueError(number)
        return 10 * number


@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_the_next_item_is_started_before_a_result_is_awaited_and_no_other(count: int) -> None:
    work = Work(count)
    assert list(one_ahead(work)) == [(number, 10 * number) for number in range(count)]
    order = [work.log.index(f"start {number}") for number in range(count)]
    for number in range(count):
        awaited = work.log.index(f"wait {number}")
        assert sum(start < awaited for start in order) == min(number + 2, count)


def test_an_item_that_cannot_be_started_costs_no_result_before_it() -> None:
    got: list[tuple[int, int]] = []
    with pytest.raises(ValueError, match="2"):
        got.extend(one_ahead(Work(5, bad_start=2)))
    assert got == [(0, 0), (1, 10)]


def test_nothing_comes_after_a_result_that_failed() -> None:
    got: list[tuple[int, int]] = []
    with pytest.raises(ValueError, match="1"):
        got.extend(one_ahead(Work(5, bad_wait=1)))
    assert got == [(0, 0)]


def test_results_are_on_their_way_before_the_next_forward_and_awaited_after_it(
    tiny_model: LitModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = tiny_model.patch_sizes[:2]
    side = tiny_model.image_size
    batches = [batch(seed) for seed in range(3)]
    for one in batches:
        assert one.images is not None
        one.images = one.images[..., :side, :side].contiguous()
    expected = list(embed_batches(tiny_model, batches, sizes))
    log: list[str] = []

    def noted(owner: Any, name: str, word: str) -> None:
        real = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            log.append(word)
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    noted(LitModel, "encode_image", "forward")
    noted(gpu_stand_in._Stream, "record_event", "sent")
    noted(gpu_stand_in._Event, "synchronize", "awaited")
    with gpu_stand_in.gpu_stand_in() as gpu:
        found = list(embed_batches(copy.deepcopy(tiny_model).to(gpu), batches, sizes))
    begun = ["forward", "forward", "sent"]
    assert log == [*begun, *begun, "awaited", *begun, "awaited", "awaited"]
    for (_, here), (_, there) in zip(expected, found, strict=True):
        for size in sizes:
            torch.testing.assert_close(torch.tensor(there[size]), torch.tensor(here[size]))


@pytest.mark.parametrize("shaped", [False, True])
def test_starting_a_batch_never_waits_for_the_gpu(
    shaped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[str] = []
    real = gpu_stand_in.call

    def call(func: Any, args: Any, kwargs: Any) -> Any:
        out = real(func, args, kwargs)
        sides = {
            isinstance(t, Gpu) for t in tree_leaves((args, kwargs, out)) if isinstance(t, Tensor)
        }
        ahead = kwargs.get("non_blocking") or (
            func.overloadpacket is torch.ops.aten.copy_ and args[2:] == (True,)
        )
        if (len(sides) == 2 and not ahead) or (True in sides and "_local_scalar" in str(func)):
            waits.append(str(func))
        return out

    monkeypatch.setattr(gpu_stand_in, "call", call)
    tower = load_vision_tower(TINY_TOWER)
    sizes = SIZES[:1] if shaped else SIZES
    expected = compute_features(tower, batch(0, shaped), sizes)
    with gpu_stand_in.gpu_stand_in() as gpu:
        tower.to(gpu)
        start_features(tower, batch(0, shaped), sizes)  # resizes the kernel and positions
        waits.clear()
        wait = start_features(tower, batch(0, shaped), sizes)
        assert not waits
        found = wait()
    for size in sizes:
        tolerance = {"rtol": 2e-3, "atol": 2e-3} if shaped else {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(found[size], expected[size], **tolerance)
