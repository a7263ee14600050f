"""What an evaluation found: shares with their standard errors, per data set and patch size."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields

from retrieval.detail import Detail, as_key
from retrieval.evaluation.calibration_error import CalibrationError
from retrieval.evaluation.metrics import Estimate, Recall


@dataclass(frozen=True)
class DenseScores:
    """How well masks, boxes and segments were found: shares in [0, 1]; None: the set has none."""

    miou: float | None = None
    pixel_accuracy: float | None = None
    iou_per_class: tuple[float, ...] = ()  # background first; nan of what is nowhere
    ap: float | None = None  # mean over overlaps of 0.5 to 0.95, as COCO has it
    ap50: float | None = None
    pq: float | None = None
    sq: float | None = None
    rq: float | None = None
    pq_things: float | None = None
    pq_stuff: float | None = None

    def shares(self) -> dict[str, float]:
        """What was measured, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "iou_per_class"}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class DatasetResult:
    """What one data set gave, per patch size."""

    name: str
    num_images: int  # that were read
    num_classes: int = 0  # 0: not classified
    errors: Mapping[str, int] = field(default_factory=dict)  # images that were not read, by kind
    accuracy: Mapping[Detail, Mapping[int, Estimate]] = field(default_factory=dict)  # patch -> k
    recall: Mapping[Detail, Recall] = field(default_factory=dict)  # patch ->
    class_recall: Mapping[Detail, Estimate] = field(default_factory=dict)  # mean over classes
    calibration: Mapping[Detail, CalibrationError] = field(default_factory=dict)  # patch ->
    dense: Mapping[Detail, DenseScores] = field(default_factory=dict)  # patch ->
    noted: Mapping[str, int] = field(default_factory=dict)  # what its annotations hold, by kind
    remark: str = ""  # what the numbers must be read with, such as classes that differ
    left_out: int = 0  # images that the set's protocol does not score
    empty_classes: int = 0  # that have names and no images
    uncaptioned: int = 0  # images that recall, which was asked for, leaves out

    def figures(self) -> dict[str, float]:
        """All shares by name, `pets/p28/top1`, and how many images were not read."""
        found: dict[str, float] = {}
        for size, by_k in self.accuracy.items():
            found |= {f"{_name(size)}/top{k}": e.value for k, e in by_k.items()}
        found |= {f"{_name(size)}/per_class": e.value for size, e in self.class_recall.items()}
        found |= {f"{_name(size)}/ece": error.final for size, error in self.calibration.items()}
        for size, scores in self.dense.items():
            found |= {f"{_name(size)}/{name}": value for name, value in scores.shares().items()}
        for size, recall in self.recall.items():
            for way in ("image_to_text", "text_to_image"):
                by_k = getattr(recall, way)
                found |= {f"{_name(size)}/{way}/recall{k}": e.value for k, e in by_k.items()}
        not_read = {"not_read": float(sum(self.errors.values()))} if self.errors else {}
        return {f"{self.name}/{name}": value for name, value in (found | not_read).items()}


def _name(detail: Detail) -> str:
    return f"p{detail}" if isinstance(detail, int) else str(as_key(detail))
