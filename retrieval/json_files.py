"""JSON files that are replaced atomically: a reader never sees half of one."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from data.files import write_text_atomically


def write_json(file: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON file in place of the one there."""
    text = json.dumps(value, indent=2) + "\n"
    write_text_atomically(file, text)
