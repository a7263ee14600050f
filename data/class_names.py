"""Class names and prompt templates for zero-shot classification, in CLIP_benchmark's text files.

`classnames.txt` has one name per line, in the order of the labels in `KEY.cls`;
`zeroshot_classification_templates.txt` has one template per line with `{c}` where the name goes.
"""

from collections.abc import Iterable
from pathlib import Path

from data.errors import UsageError

CLASS_NAMES_FILE = "classnames.txt"
TEMPLATES_FILE = "zeroshot_classification_templates.txt"

# For data sets that bring no templates of their own.
DEFAULT_TEMPLATES = ("{c}", "a photo of a {c}", "a picture of a {c}", "a drawing of a {c}")


def read_class_names(file: str | Path) -> list[str]:
    """The name of each label. Names may repeat, as ImageNet's do.

    Raises `UsageError` for a file that is missing, empty or not UTF-8, and for an empty line, which
    would shift the labels.
    """
    return _read_lines(file, "class names")


def read_templates(file: str | Path) -> list[str]:
    """Prompt templates. Raises `UsageError` as `read_class_names`, and for a line without `{c}`."""
    templates = _read_lines(file, "templates")
    for number, template in enumerate(templates, 1):
        if "{c}" not in template:
            raise UsageError(f"{file}:{number}: no {{c}} in template {template!r}")
    return templates


def write_class_names(folder: Path, class_names: Iterable[str], templates: Iterable[str]) -> None:
    """Write both files into `folder`."""
    for file, lines in ((CLASS_NAMES_FILE, class_names), (TEMPLATES_FILE, templates)):
        (folder / file).write_text("".join(f"{line}\n" for line in lines))


def fill_template(template: str, name: str) -> str:
    """The prompt of one class: `fill_template("a photo of a {c}", "cat")`."""
    return template.replace("{c}", name)  # str.format would fail on other braces


def _read_lines(file: str | Path, what: str) -> list[str]:
    try:
        text = Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"{file} is not UTF-8 (byte {error.start}): {what} must be") from None
    except OSError as error:
        raise UsageError(f"cannot read {what} from {file}: {error.strerror}") from None
    lines = [line.strip() for line in text.rstrip().split("\n")]
    if lines == [""]:
        raise UsageError(f"{file} is empty: one line per entry of the {what} is needed")
    if "" in lines:
        raise UsageError(f"{file}:{lines.index('') + 1}: empty line among the {what}")
    return lines
