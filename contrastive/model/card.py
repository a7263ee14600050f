"""The model card: README.md of a saved model, with a table of what each patch size costs and gives.

Front matter and sections follow Hugging Face's model cards (Mitchell et al., arXiv:1810.03993).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from data.numbers import rounded


@dataclass(frozen=True)
class Card:
    """Facts that a model cannot tell by itself (JSON-able); empty ones are left out of the card."""

    license: str = "unknown"
    """An identifier of the hub's list, such as mit."""
    shards: tuple[str, ...] = ()
    """Of the training data, as the command named them."""
    samples: int = 0
    """In those shards; 0: not counted."""
    steps: int = 0
    global_batch_size: int = 0
    command: str = ""
    revision: str = ""
    """Of this code."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """Evaluations by `DATASET/pPATCH/METRIC`, as evaluators in training name them: shares."""

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Card":
        return cls(**{**values, "shards": tuple(values.get("shards", ()))})


@dataclass(frozen=True)
class ModelFacts:
    """Facts that a model can tell by itself."""

    image_tower: str
    image_size: int  # pixels a side
    text_tower: str
    context_length: int  # tokens
    loss: str
    embed_dim: int
    costs: Mapping[int, tuple[int, float]]  # patch size -> tokens, GFLOPs of an image


def front_matter(library: str, license: str) -> str:
    """The YAML that the hub reads."""
    lines = (
        f"license: {license}",
        f"library_name: {library}",
        "pipeline_tag: zero-shot-image-classification",
        "tags:",
        "- flexilit",
        "- image-text",
    )
    return "\n".join(("---", *lines, "---"))


def model_card(facts: ModelFacts, card: Card) -> str:
    """README.md as text."""
    example, width = next(iter(facts.costs)), facts.embed_dim
    parts = [
        front_matter("flexilit", card.license),
        "# An image-text model for any patch size\n\n"
        f"Image tower {facts.image_tower} at {facts.image_size} px, locked; text tower "
        f"{facts.text_tower} of {facts.context_length} tokens, trained to read it "
        f"with the {facts.loss} loss; {width} dimensions.",
        "```python\n"
        "from contrastive import LitModel\n\n"
        'model = LitModel.from_pretrained("FOLDER_OR_HUB_NAME")\n'
        f"model.encode_image(images, patch_size={example})  # (b, {width}), unit norm\n"
        'model.encode_text(["a red bicycle"])\n'
        "```",
        "## Patch sizes\n\n" + _table(facts.costs, card.figures),
    ]
    training = {
        "Training data": ", ".join(f"`{shards}`" for shards in card.shards),
        "Samples": f"{card.samples:,}" if card.samples else "",
        "Steps": f"{card.steps:,} of {card.global_batch_size:,} pairs" if card.steps else "",
        "Command": f"`{card.command}`" if card.command else "",
        "Revision of the code": f"`{card.revision}`" if card.revision else "",
    }
    known = [f"- {name}: {value}" for name, value in training.items() if value]
    if known:
        parts.append("## Training\n\n" + "\n".join(known))
    return "\n\n".join(parts) + "\n"


def _table(costs: Mapping[int, tuple[int, float]], figures: Mapping[str, float]) -> str:
    """A row per patch size; a column per data set and metric, in per cent."""
    results: dict[str, dict[int, float]] = {}
    for name, value in figures.items():
        if match := re.fullmatch(r"(.+)/p(\d+)/(.+)", name):
            column = f"{match[1]}: {match[3]}, %"
            results.setdefault(column, {})[int(match[2])] = value
    rows = [["patch", "tokens", "GFLOPs", *results], ["---:"] * (3 + len(results))]
    for size, (tokens, gflops) in costs.items():
        values = [f"{100 * r[size]:.1f}" if size in r else "" for r in results.values()]
        rows.append([f"{size}", f"{tokens}", rounded(gflops, 3), *values])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
