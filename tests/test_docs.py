"""What README.md, CONTRIBUTING.md and docs/ name is there: files, flags, results."""

import dataclasses
import importlib
import re
import sys
import typing
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
CONFIGS = (
    "contrastive.train.config.TrainConfig",
    "contrastive.flexify.config.FlexifyConfig",
    "contrastive.dense.config.DenseConfig",
    "retrieval.server.config.ServeConfig",
)
# Flags of deepspeed, docker, pip, tar, img2dataset and open_clip, and of this project's benchmarks.
OTHERS = {
    "num_gpus", "num_accelerators", "include", "hostfile", "master_port", "group", "no-deps",
    "accum-freq", "dereference", "hard-dereference", "shm-size",
    "url_list", "input_format", "url_col", "caption_col", "output_format", "output_folder",
    "image_size", "resize_mode", "resize_only_if_bigger", "kinds", "boxes",
    "table", "rounds", "seeds", "counts", "mixtures", "index-types", "sizes", "list", "part",
    "tiny", "dry-run", "report", "all", "exclude-editable", "help", "help-all", "resume", "json",
}  # fmt: skip


def flags_of(config: type, prefix: str = "") -> set[str]:
    """The flags that fill a dataclass, without their dashes."""
    found = set()
    for name, hint in typing.get_type_hints(config).items():
        if dataclasses.is_dataclass(hint):
            found |= flags_of(typing.cast(type, hint), f"{prefix}{name}.")
        else:
            found.add((prefix + name).replace("_", "-"))
    return found


def all_flags(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    found = set(OTHERS)
    for name in CONFIGS:
        module, _, cls = name.rpartition(".")
        found |= flags_of(getattr(importlib.import_module(module), cls))
    for file in (ROOT / "launch").glob("*.py"):
        monkeypatch.delitem(sys.modules, file.stem, raising=False)
        program = importlib.import_module(file.stem)
        found |= flags_of(program.Args) if hasattr(program, "Args") else set()
        sys.modules.pop(file.stem)
    return found


def test_flags_named_are_flags(monkeypatch):
    known = all_flags(monkeypatch)
    known |= {flag.partition(".")[0] for flag in known if "." in flag}  # "the --optim flags"
    for name, text in TEXT.items():
        for flag in re.findall(r"(?<![\w-])--([a-z][\w.-]*[a-z0-9])", text):
            assert flag in known, f"{name} names --{flag}"


def test_modules_and_files_named_exist():
    roots = "data|contrastive|retrieval|launch|benchmarks|tests|examples|docs"
    for name, text in TEXT.items():
        for path in re.findall(rf"`((?:{roots})/[\w/.-]*)`", text):
            assert (ROOT / path).exists() or "NAME" in path, f"{name} names {path}"


def test_every_kind_of_bad_sample_is_explained():
    kinds = {"link", "special_file", "truncated", "compressed", "trailing_data", "truncated_image"}
    for file in [
        f for top in ("data", "contrastive", "retrieval") for f in (ROOT / top).rglob("*")
    ]:
        if file.suffix == ".py":
            code = file.read_text(encoding="utf-8")
            kinds |= set(re.findall(r'(?:BadSample|_?[pP]roblem)\(\s*"(\w+)"', code))
    assert {"ambiguous_name", "second_image", "unknown_suffix", "image_too_costly"} <= kinds
    section = TEXT["troubleshooting.md"].partition("## Skipped samples")[2].partition("\n## ")[0]
    rows = [row.split("|")[1] for row in section.splitlines() if row.startswith("|")]
    assert kinds <= set(re.findall(r"`(\w+)`", "".join(rows)))


def test_every_result_has_its_row_among_the_benchmarks():
    for file in (ROOT / "benchmarks/results").glob("*.json"):
        assert f"({'../benchmarks/results/' + file.name})" in TEXT["benchmarks.md"]


def test_the_readme_fits_two_screens():
    assert len(TEXT["README.md"].splitlines()) <= 130


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r'"([\w-]+\.md)"', (ROOT / "zensical.toml").read_text()))
    assert listed == set(TEXT) - {"README.md", "CONTRIBUTING.md"}


def test_what_pages_take_in_from_other_files_is_there():
    for name, text in TEXT.items():
        for line in re.findall(r"^-+ *8 *<.*$", text, re.MULTILINE):
            found = re.fullmatch(r'--8<-- "([^"]+)"', line)
            assert found, f"{name}: {line}, which a formatter has made of another"
            assert (ROOT / found[1]).is_file(), f"{name} takes in {found[1]}"
