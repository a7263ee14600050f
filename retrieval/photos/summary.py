"""What a run did to the index of a folder of photos."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from data.problems import Problem, add_counts


@dataclass
class PhotosReport:
    """Counts of photos, but where it says otherwise."""

    added: int = 0
    changed: int = 0  # the photo or its caption
    gone: int = 0
    unchanged: int = 0
    known: int = 0  # of added and changed: contents that the index held, not embedded again
    kept: int = 0  # whose folder shows no photo any more, or that cannot be looked at
    kept_folders: list[str] = field(default_factory=list)  # of these, within the folder of photos
    errors: dict[str, int] = field(default_factory=dict)  # photos that cannot be read, by reason
    captions: dict[str, int] = field(default_factory=dict)  # that cannot be used, by reason
    left_out: dict[str, int] = field(default_factory=dict)  # files and folders, by kind or suffix
    examples: dict[str, str] = field(default_factory=dict)  # reason -> the first such photo
    moved_from: str = ""  # the folder that the photos were in before
    reason: str = ""  # for the index type

    def skip(self, problem: Problem) -> None:
        """Count a photo that cannot be read."""
        add_counts(self.errors, {problem.kind: 1})
        self.examples.setdefault(problem.kind, problem.key)

    @property
    def num_taken(self) -> int:
        return self.added + self.changed

    def lines(self, images: str) -> list[str]:
        """The report for a reader, a line for each subject. images: the folder."""
        known = f" ({self.known:,} of these known and not embedded again)" if self.known else ""
        lines = [
            f"{self.added:,} new, {self.changed:,} changed{known}, {self.gone:,} gone, "
            f"{self.unchanged:,} as before; skipped: {self._skipped()}"
        ]
        if "heic" in self.errors:
            lines.append("HEIC is read once pillow-heif is there: pip install pillow-heif")
        if self.moved_from:
            lines.insert(0, f"its photos were in {self.moved_from}, now in {images}")
        if self.captions:
            lines.append(f"captions that cannot be used: {by_kind(self.captions)}")
        if self.left_out:
            lines.append(f"left out: {by_kind(self.left_out)}")
        if self.kept:
            first = self.kept_folders[0] or images
            more = ", ..." if len(self.kept_folders) > 1 else ""
            lines.append(
                f"kept {self.kept:,} photos of folders that are empty, missing or cannot be listed "
                f"({first}{more}); launch/index.py --prune drops them"
            )
        return lines

    def _skipped(self) -> str:
        texts = []
        for kind, count in self.errors.items():
            example = self.examples.get(kind, "")
            more = ", ..." if count > 1 else ""
            texts.append(f"{kind} {count:,}" + (f" ({example}{more})" if example else ""))
        return ", ".join(texts) or "none"


def by_kind(counts: Mapping[str, int]) -> str:
    """Counts in words."""
    return ", ".join(f"{kind} {n:,}" for kind, n in counts.items()) or "none"
