"""Model cards: README.md of a saved model or tower, with what each patch size costs and gives.

Front matter and sections follow Hugging Face's model cards (Mitchell et al., arXiv:1810.03993).
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
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
    teacher: str = ""
    """Whose image tower was made flexible, and whose texts the model has."""

    def as_json(self) -> dict[str, Any]:
        """What `from_json` reads; earlier versions too, where there is no teacher."""
        values = asdict(self)
        return values if self.teacher else {k: v for k, v in values.items() if k != "teacher"}

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
    features: str = "own"  # that are joined
    head: str = "none"  # that is trained over them
    text_head: str = "none"
    fit: str = "crop"  # how an image becomes what the tower reads


@dataclass(frozen=True)
class TowerFacts:
    """Facts of a tower that was made flexible."""

    tower: str
    image_size: int  # pixels a side
    teacher: str
    costs: Mapping[int, tuple[int, float]]  # patch size -> tokens, GFLOPs of an image
    figures: Mapping[int, Mapping[str, float]]  # patch size -> how close it is to its teacher
    figures_of: str  # the images that were looked at


def front_matter(library: str, license: str, task: str = "zero-shot-image-classification") -> str:
    """The YAML that the hub reads."""
    lines = (
        f"license: {license}",
        f"library_name: {library}",
        f"pipeline_tag: {task}",
        "tags:",
        "- flexilit",
        "- image-text" if task.startswith("zero-shot") else "- image-features",
    )
    return "\n".join(("---", *lines, "---"))


def model_card(facts: ModelFacts, card: Card) -> str:
    """README.md as text."""
    example, width = next(iter(facts.costs)), facts.embed_dim
    made_here = len(facts.costs) > 1 or card.steps
    locked = ", locked" if made_here else ", of a checkpoint as it stands"
    heads = {"linear": " under a linear head", "mlp": " under a gated MLP", "none": ""}
    head, text_head = heads[facts.head], heads[facts.text_head]
    trained = f", trained to read it with the {facts.loss} loss" if made_here else ""
    if card.teacher:
        locked, trained = f", made flexible with {card.teacher} as its teacher", ", the teacher's"
    joined = "" if facts.features == "own" else f" (features {facts.features})"
    whole = ", which reads pictures of any shape whole" if facts.fit == "aspect" else ""
    parts = [
        front_matter("flexilit", card.license),
        f"# An image-text model{' for any patch size' * (len(facts.costs) > 1)}\n\n"
        f"Image tower {facts.image_tower}{joined} at {facts.image_size} px{locked}{head}{whole}; "
        f"text tower {facts.text_tower} of {facts.context_length} tokens{text_head}{trained}; "
        f"{width} dimensions.",
        "```python\n"
        "from contrastive import LitModel\n\n"
        'model = LitModel.from_pretrained("FOLDER_OR_HUB_NAME")\n'
        f"model.encode_image(images, patch_size={example})  # (b, {width}), unit norm\n"
        'model.encode_text(["a red bicycle"])\n'
        "```",
        "## Patch sizes\n\n" + _table(facts.costs, _evaluations(card.figures)),
        *_training(card, "images" if card.teacher else "pairs"),
    ]
    return "\n\n".join(parts) + "\n"


def tower_card(facts: TowerFacts, card: Card) -> str:
    """README.md of a tower that was made flexible, as text."""
    columns: dict[str, dict[int, str]] = {}
    for size, row in facts.figures.items():
        for name, value in row.items():
            share = name in ("agreement", "top1")
            column = columns.setdefault(f"{name}, %" if share else name, {})
            column[size] = f"{100 * value:.1f}" if share else f"{value:.4f}"
    parts = [
        front_matter("flexilit", card.license, "image-feature-extraction"),
        "# An image tower for any patch size\n\n"
        f"{facts.tower} at {facts.image_size} px, made flexible with {facts.teacher} as its "
        "teacher.",
        "```python\n"
        "from contrastive import load_vision_tower\n\n"
        'tower = load_vision_tower("FOLDER")\n'
        f"tower(images, patch_size={next(iter(facts.costs))})  # (b, d), not unit-normed\n"
        "```",
        "## Patch sizes\n\n" + _table(facts.costs, columns),
        *([f"Student against teacher, means over {facts.figures_of}."] if columns else []),
        *_training(card, "images"),
    ]
    return "\n\n".join(parts) + "\n"


def _training(card: Card, unit: str) -> list[str]:
    """The section on the training; none where nothing is known."""
    training = {
        "Training data": ", ".join(f"`{shards}`" for shards in card.shards),
        "Samples": f"{card.samples:,}" if card.samples else "",
        "Steps": f"{card.steps:,} of {card.global_batch_size:,} {unit}" if card.steps else "",
        "Command": f"`{card.command}`" if card.command else "",
        "Revision of the code": f"`{card.revision}`" if card.revision else "",
    }
    known = [f"- {name}: {value}" for name, value in training.items() if value]
    return ["## Training\n\n" + "\n".join(known)] if known else []


def _evaluations(figures: Mapping[str, float]) -> dict[str, dict[int, str]]:
    """A column per data set and metric, in per cent, by patch size."""
    columns: dict[str, dict[int, str]] = {}
    for name, value in figures.items():
        if match := re.fullmatch(r"(.+)/p(\d+)/(.+)", name):
            column = columns.setdefault(f"{match[1]}: {match[3]}, %", {})
            column[int(match[2])] = f"{100 * value:.1f}"
    return columns


def _table(costs: Mapping[int, tuple[int, float]], columns: Mapping[str, Mapping[int, str]]) -> str:
    """A row per patch size: what it costs, and what the columns have of it."""
    rows = [["patch", "tokens", "GFLOPs", *columns], ["---:"] * (3 + len(columns))]
    for size, (tokens, gflops) in costs.items():
        values = [column.get(size, "") for column in columns.values()]
        rows.append([f"{size}", f"{tokens}", rounded(gflops, 3), *values])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)
