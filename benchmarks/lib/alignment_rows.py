"""The rows of benchmarks/alignment.py: what each changes in the demo's recipe."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

TOWER = "dinov2s-flexi"
TERMS = ("cls@9", "cls@10", "cls@11", "cls", "mean@10", "mean@11", "mean")
FROZEN = {"text.frozen": True, "text.dropout": 0.0, "text.head": "mlp", "optim.lr": 1e-3}
BLOCKS = "cls@9+cls@10+cls@11"
WITH_MEAN = f"{BLOCKS}+mean@10"
KINDS = "kinds of photographs"
TESTS = ("heldout_captions", "heldout_style", KINDS, "photographs")
COARSE_SIZES = (56, 28)
DEMO_SIZES = (56, 32, 28, 16)


@dataclass(frozen=True)
class Row:
    """Dotted fields of the recipe, by what they become."""

    changes: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 400
    icons: float = 0.0  # share of the samples that are icons
    on: Literal["fit", "train"] = "fit"
    judged_on: tuple[str, ...] = ("validation",)
    sizes: tuple[int, ...] = COARSE_SIZES  # that are trained at, and validated
    model: str = ""  # a folder of the first seed's model, which is there already


def frozen(features: str = "own", steps: int = 400, icons: float = 0, **more: Any) -> Row:
    """A frozen text tower under a head; more: fields, a dot as two underscores."""
    changes = {name.replace("__", "."): value for name, value in more.items()}
    return Row({**FROZEN, "vision.features": features, **changes}, steps, icons)


def with_icons(steps: int, share: float) -> Row:
    """The best of the combined rows with icons; photographs are measured, not chosen by."""
    row = frozen(BLOCKS, steps, share, **WIDE, vision__head="mlp")
    return replace(row, judged_on=("validation", "photographs"))


def final(row: Row, sizes: tuple[int, ...] = DEMO_SIZES) -> Row:
    """A whole recipe, on all trained drawings."""
    return replace(row, on="train", judged_on=TESTS, sizes=sizes)


BEST = "demo-large"
WIDE = {"embed_dim": 768, "data__captions_per_image": 4}

ROWS: dict[str, dict[str, Row]] = {
    # one change each
    "single": {
        "own": frozen(),
        "mean@10": frozen("mean@10"),
        "cls@11": frozen("cls@11"),
        "cls+mean": frozen("cls+mean"),
        BLOCKS: frozen(BLOCKS),
        "all seven": frozen("+".join(TERMS)),
        f"{BLOCKS}, width 768": frozen(BLOCKS, embed_dim=768),
        f"{BLOCKS}, no text head": frozen(BLOCKS, text__head="none"),
        f"{BLOCKS}, linear image head": frozen(BLOCKS, vision__head="linear"),
        f"{BLOCKS}, mlp image head": frozen(BLOCKS, vision__head="mlp"),
        f"{BLOCKS}, 4 captions": frozen(BLOCKS, data__captions_per_image=4),
        f"{BLOCKS}, sigmoid": frozen(
            BLOCKS, loss__kind="sigmoid", loss__temperature_init=10.0, loss__bias_init=-10.0
        ),
    },
    # the text tower trained too, which takes hours
    "trained": {
        "trained: own": Row(),
        "trained: mean@10": Row({"vision.features": "mean@10"}),
        "trained: blocks": Row({"vision.features": BLOCKS}),
        "trained: blocks, last two blocks": Row(
            {"vision.features": BLOCKS, "text.trainable": (r"layer\.[45]\.",)}
        ),
        "trained: blocks, near the start": Row(
            {"vision.features": BLOCKS, "text.decay_to_start": 0.3}
        ),
        # LoRA wants larger steps
        "trained: own, LoRA of rank 16": Row({"text.lora": 16, "optim.lr": 1e-3}),
    },
    # several; width 768 and 4 captions where not said otherwise
    "combined": {
        "own, width 384": frozen(data__captions_per_image=4),
        "mean@10, width 384": frozen("mean@10", data__captions_per_image=4),
        "mean@10, width 384, mlp": frozen(
            "mean@10", data__captions_per_image=4, vision__head="mlp"
        ),
        "blocks": frozen(BLOCKS, **WIDE),
        "blocks, linear": frozen(BLOCKS, **WIDE, vision__head="linear"),
        "blocks, mlp": frozen(BLOCKS, **WIDE, vision__head="mlp"),
        "blocks and mean": frozen(WITH_MEAN, **WIDE),
        "blocks and mean, mlp": frozen(WITH_MEAN, **WIDE, vision__head="mlp"),
    },
    # of the best: longer, slower, held back; at the demo's patch sizes
    "further": {
        "1200 steps": frozen(BLOCKS, 1200, **WIDE, vision__head="mlp"),
        "learning rate 0.0004": frozen(BLOCKS, **WIDE, vision__head="mlp", optim__lr=4e-4),
        "weight decay 1": frozen(BLOCKS, **WIDE, vision__head="mlp", optim__weight_decay=1.0),
        "four patch sizes": replace(frozen(BLOCKS, **WIDE, vision__head="mlp"), sizes=DEMO_SIZES),
        "four patch sizes, 800 steps": replace(
            frozen(BLOCKS, 800, **WIDE, vision__head="mlp"), sizes=DEMO_SIZES
        ),
    },
    # a share of the samples
    "icons": {
        f"{steps} steps, {words}": with_icons(steps, share)
        for steps in (400, 800, 1200)
        for share, words in ((0.0, "no icons"), (0.5, "half icons"))
    },
    # looked at once
    "final": {
        "today": final(Row(steps=600, model="runs/demo")),  # as `make demo` leaves it
        BEST: final(frozen(BLOCKS, **WIDE, vision__head="mlp")),
        f"{BEST}, at 56 and 28": final(frozen(BLOCKS, **WIDE, vision__head="mlp"), COARSE_SIZES),
        "own, frozen text tower": final(frozen(data__captions_per_image=4)),
        "own, frozen text tower, at 56 and 28": final(
            frozen(data__captions_per_image=4), COARSE_SIZES
        ),
        "mean@10, trained text tower": final(Row({"vision.features": "mean@10"}, 600)),
    },
}
