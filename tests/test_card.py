"""The model card, and models that come from a hub."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from threading import Thread

import pytest
from hub_stub import Hub
from huggingface_hub import ModelCard

from contrastive import LitModel
from contrastive.model.card import Card
from data.errors import UsageError

CARD = Card(
    shards=("cc12m/{00000..01242}.tar",),
    samples=12_400_000,
    steps=5000,
    global_batch_size=4096,
    command="deepspeed launch/lit.py cc12m",
    revision="0123456789ab",
    figures={"imagenet/p48/top1": 0.4567, "imagenet/p30/top1": 0.5},
)


def test_a_card_tells_data_command_revision_and_what_each_patch_size_costs_and_gives(
    tiny_model, tmp_path
):
    tiny_model.save_pretrained(tmp_path / "model", CARD)
    card = ModelCard.load(tmp_path / "model/README.md")
    assert card.data.license == "unknown"
    assert card.data.library_name == "flexilit"
    assert card.data.pipeline_tag == "zero-shot-image-classification"
    assert "| patch | tokens | GFLOPs | imagenet: top1, % |" in card.text
    rows = [line.split(" | ") for line in card.text.splitlines() if line.startswith("| ")]
    sizes = [row[0].removeprefix("| ") for row in rows[2:]]
    assert sizes == [str(size) for size in tiny_model.patch_sizes]
    (row,) = (row for row in rows if row[0] == "| 48")
    assert row[1] == "26"
    assert float(row[2]) == pytest.approx(tiny_model.vision.gflops(48), rel=1e-2)
    assert row[3] == "45.7 |"
    for fact in ("`cc12m/{00000..01242}.tar`", "12,400,000", "5,000 of 4,096 pairs"):
        assert fact in card.text
    assert CARD.command in card.text
    assert CARD.revision in card.text


def test_a_model_that_is_saved_again_keeps_its_card(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "one", replace(CARD, license="mit"))
    model = LitModel.from_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "two")
    one, two = ((tmp_path / name / "README.md").read_text() for name in ("one", "two"))
    assert one == two
    assert "license: mit" in two


PROGRAM = """
import sys, torch
from contrastive import LitModel
model = LitModel.from_pretrained(sys.argv[1])
model.push_to_hub("user/name", token="t")
again = LitModel.from_pretrained("user/name", token="t")
assert again.text_fingerprint == model.text_fingerprint
assert again.image_fingerprint == model.image_fingerprint
assert again.card == model.card
"""


def test_a_pushed_model_comes_back_by_its_name(tiny_model, tmp_path):
    tiny_model.save_pretrained(tmp_path / "model", CARD)
    with Hub() as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        where = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_HUB_OFFLINE": "0"}
        where |= {"HF_HOME": str(tmp_path / "cache"), "HF_HUB_DISABLE_XET": "1"}
        program = [sys.executable, "-c", PROGRAM, str(tmp_path / "model")]
        done = subprocess.run(program, env=os.environ | where, capture_output=True, text=True)
        hub.shutdown()
    assert done.returncode == 0, done.stderr
    written = {file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()}
    assert hub.files.keys() == written.keys()
    for name in ("README.md", "model.safetensors"):
        assert hub.files[name] == written[name]
    pushed, kept = (json.loads(files["config.json"]) for files in (hub.files, written))
    digests = {"files", "blake2b"}  # tokenizers write other files of what they have read
    assert {k: v for k, v in pushed.items() if k not in digests} == {
        k: v for k, v in kept.items() if k not in digests
    }


def test_a_name_that_is_neither_folder_nor_on_the_hub_is_one_sentence():
    with pytest.raises(UsageError, match="user/none is not a model folder, nor does the hub give"):
        LitModel.from_pretrained("user/none")
