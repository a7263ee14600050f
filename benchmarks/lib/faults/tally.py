"""What became of each fault."""

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class Tally:
    """Outcomes of one kind of fault."""

    what: str
    tried: int = 0
    noticed: int = 0  # told in a sentence, and what was asked again was right
    harmless: int = 0  # nothing but the right result
    lost: list[str] = field(default_factory=list)  # wrong, stuck, a traceback; what it said
    unpromised: Counter[str] = field(default_factory=Counter)  # harm that no promise excludes

    def add(self, outcome: str, detail: str = "") -> None:
        """outcome: `noticed`, `harmless`, `unpromised` or `lost`; detail: of the last two."""
        self.tried += 1
        if outcome == "noticed":
            self.noticed += 1
        elif outcome == "harmless":
            self.harmless += 1
        elif outcome == "unpromised":
            self.unpromised[detail] += 1
        else:
            self.lost.append(detail)
            print(f"LOST {self.what}: {detail}", flush=True)

    def figures(self) -> dict[str, object]:
        figures: dict[str, object] = {"tried": self.tried, "noticed": self.noticed}
        figures |= {"without_effect": self.harmless, "lost": len(self.lost)}
        if self.lost:
            figures["examples"] = self.lost[:20]
        if self.unpromised:
            figures["unpromised"] = dict(self.unpromised)
        return figures
