"""What an image tower is rebuilt from, as config.json keeps it and fingerprints hash it."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal, get_args

from torch import nn

from contrastive.files.weights import hash_weights, tensor_bytes
from contrastive.vision.resize import MODES, PositionResize
from data.errors import UsageError
from data.transform import VERSIONS, Fit, ImageTransform

Library = Literal["timm", "transformers", "open_clip", "vit_pytorch"]
LIBRARIES: tuple[str, ...] = get_args(Library)

KEYS = {"name": "timm_name", "args": "timm_args"}
"""Fields whose key in config.json and in fingerprints differs from their name here."""


@dataclass(frozen=True)
class TowerConfig:
    """What is needed to rebuild a tower before its weights are read (JSON-able)."""

    name: str
    """Of the architecture, as `library` spells it."""
    args: dict[str, Any] = field(default_factory=dict)
    """What `library` is given besides the name."""
    image_size: int = 224
    """Pixels a side."""
    patch_sizes: tuple[int, ...] = ()
    """Those offered, coarsest first. Empty: `default_patch_sizes`."""
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    positions: PositionResize = field(default_factory=PositionResize)
    library: Library = "timm"
    projection: int = 0
    """Width of a bias-free linear map after the pooling, as CLIP has; 0: none."""
    features: str = "own"
    """Which tokens of which blocks are joined (`contrastive.vision.feature_terms`)."""
    transform: int = 1
    """Version of `data.transform.ImageTransform`; folders of 0.1 do not name it."""
    fit: Fit = "crop"
    """How an image becomes what the tower reads (`data.transform.ImageTransform`)."""

    def to_json(self) -> dict[str, Any]:
        """The entries of config.json; new ones only where an earlier version would read another
        tower."""
        entries = {KEYS.get(name, name): value for name, value in asdict(self).items()}
        for name in ("features", "fit"):
            if entries[name] == getattr(TowerConfig, name):
                del entries[name]
        return entries

    @classmethod
    def from_json(cls, values: Any) -> "TowerConfig":
        """What `to_json` gave; `UsageError` for anything else."""
        try:
            values = dict(values)
            mode, library = values["positions"]["mode"], values.get("library", "timm")
            fit = values.get("fit", "crop")
            for value, allowed in ((library, LIBRARIES), (mode, MODES), (fit, get_args(Fit))):
                if value not in allowed:
                    raise UsageError(f"an image tower has {value!r}; allowed: {', '.join(allowed)}")
            if values.get("transform", 1) not in VERSIONS:
                raise UsageError(
                    f"an image tower has version {values['transform']!r} of the transform; "
                    f"allowed: {', '.join(map(str, VERSIONS))}"
                )
            for name in ("patch_sizes", "mean", "std"):
                values[name] = tuple(values[name])
            values["positions"] = PositionResize(**values["positions"])
            own = {name: values.pop(key) for name, key in KEYS.items() if key in values}
            return cls(**own, **values)
        except UsageError:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"not an image tower's configuration: {error!r}") from error

    def hashed(self) -> dict[str, Any]:
        """What a tower's fingerprint covers of its configuration.

        The keys are spelled out, because existing caches and indexes are tied to their hash: a
        renamed field keeps its key, and a new one counts only where it is not at its default. Left
        out are `patch_sizes`, which lists what is offered, and `library` and `projection`, which
        the names of the weights imply.
        """
        facts = {
            "timm_name": self.name,
            "timm_args": self.args,
            "image_size": self.image_size,
            "patch_sizes": None,
            "mean": self.mean,
            "std": self.std,
            "positions": {"mode": self.positions.mode, "antialias": self.positions.antialias}
            | changed_fields(self.positions, {"mode", "antialias"}),
        }
        return facts | changed_fields(self, {*facts, *KEYS, "library", "projection"})


def fingerprint(tower: nn.Module, config: TowerConfig, transform: ImageTransform) -> str:
    """`VisionTower.fingerprint`, of a tower with this configuration and transform."""
    digest = hashlib.blake2b(digest_size=16)
    digest.update(json.dumps(config.hashed(), sort_keys=True).encode())
    digest.update(transform.fingerprint().encode())
    hash_weights(digest, tower.state_dict())
    return digest.hexdigest()


def made_of(tower: nn.Module, config: TowerConfig, transform: ImageTransform) -> dict[str, str]:
    """`VisionTower.made_of`, of a tower with this configuration and transform."""
    digest = hashlib.blake2b(digest_size=8)
    for _, tensor in sorted(tower.state_dict().items()):
        digest.update(tensor_bytes(tensor))
    return {
        "tower": config.name,
        "dtype": str(next(tower.parameters()).dtype).removeprefix("torch."),
        "image side": f"{config.image_size} px",
        "mean and std": f"{transform.mean} and {transform.std}",
        "features": config.features,
        "version of the transform": str(transform.version),
        "fit": transform.fit,
        "resizing of positions": json.dumps(asdict(config.positions)),
        "arguments": json.dumps(config.args, sort_keys=True),
        "weights": digest.hexdigest(),
    }


def changed_fields(config: Any, known: set[str] | Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a dataclass that are neither known nor at their default."""
    unknown = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in known}
    blank = type(config)(
        **{f.name: getattr(config, f.name) for f in fields(config) if f.name in known}
    )
    return {name: value for name, value in unknown.items() if value != getattr(blank, name)}
