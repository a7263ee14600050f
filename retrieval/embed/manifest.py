"""manifest.json of a folder of embeddings, written when everything else is there.

{"format": 1, "image_fingerprint", "text_fingerprint", "model", "width", "patch_sizes",
 "shards", "count", "errors",
 "partitions": [{"shard", "count", "identity", "blake2b", "errors"}, ...]}

Embeddings within budgets of tokens are format 2: no patch sizes, but "max_tokens": [64, 256].
"fit" is there where it was asked for, or is not the crop.

identity: what the shard is told by (`data.shards.identity`); blake2b: of the partition's files. In
folders by 0.1.0 there is neither, and nothing is checked. errors: what was skipped, by kind, of a
shard and of all; only later folders have those of each shard.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.errors import UsageError
from data.files import check_there
from data.shards.identity import confirm
from data.shards.tar import DAMAGED

_REQUIRED = {
    "image_fingerprint", "text_fingerprint", "model", "width", "patch_sizes", "partitions",
}  # fmt: skip


def read_manifest(embeddings: str | Path) -> dict[str, Any]:
    """The manifest of a folder written by `embed_shards`. Raises `UsageError` if it has none."""
    file = Path(embeddings) / "manifest.json"
    try:
        manifest = json.loads(file.read_text()) if file.is_file() else {}
    except ValueError as error:
        raise UsageError(f"{file} is damaged ({error}); embed these shards again") from error
    known = isinstance(manifest, dict) and manifest.get("format") in (1, 2)
    if not known or not manifest.keys() >= _REQUIRED:
        partial = Path(embeddings).with_name(Path(embeddings).name + ".partial")
        hint = f"; {partial} is unfinished, run embed again" if partial.is_dir() else ""
        if not hint:
            check_there(embeddings)
        raise UsageError(f"{embeddings} holds no embeddings of format 1 or 2{hint}")
    return manifest


def lost_shards(manifest: Mapping[str, Any]) -> list[str]:
    """The shards of which an end, or all, is not embedded, each with why."""
    found = []
    for entry in manifest["partitions"]:
        errors = entry.get("errors", {})
        kinds = [kind for kind in DAMAGED if kind in errors]
        if kinds or not entry["count"]:
            found.append(f"{entry['shard']} ({', '.join(kinds or errors) or 'no image'})")
    return found


def check_shards(embeddings: str | Path, manifest: Mapping[str, Any]) -> None:
    """Raises `UsageError` where a local shard was replaced since it was embedded; one that is gone
    may be elsewhere. Reads those that are copies."""
    for entry in manifest["partitions"]:
        shard, noted = entry["shard"], entry.get("identity", {})
        if "mtime_ns" in noted and Path(shard).is_file() and confirm(shard, noted) is None:
            raise UsageError(
                f"{shard} was replaced since it was embedded in {embeddings}; embed it again"
            )
