"""JSON files that are replaced whole: a reader never sees half of one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file under a temporary name, then rename it."""
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(value, indent=2) + "\n")
    part.replace(file)
