"""What a user gets wrong is told before torch and FAISS are imported."""

import json
import subprocess
from pathlib import Path

import forked
import pytest

LAUNCH = Path(__file__).parents[1] / "launch"
PROGRAM = """
import runpy, sys
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    loaded = {"torch", "faiss", "transformers", "timm", "pandas", "scipy"} & set(sys.modules)
    print("loaded:", *sorted(loaded))
"""


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    program, *rest = arguments
    return forked.run(
        "-c", PROGRAM, LAUNCH / program, *rest, cwd=LAUNCH.parent, imported=forked.LIGHT
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["embed.py", "--help"], "usage"),
        (["embed.py", "--mdoel", "m"], "--mdoel"),
        (["embed.py", "--model", "m", "--shards", "/no/a.tar", "--out", "o"], "/no/a.tar"),
        (
            ["embed.py", "--model", "m", "--shards", "a", "--out", "o", "--num-workers", "-1"],
            "--num-workers -1: at least 0",
        ),
        (
            ["embed.py", "--model", "m", "--shards", __file__, "--out", "o", "--max-tokens", "0"],
            "--max-tokens 0: allowed are 1 and more",
        ),
        (
            [
                "embed.py",
                "--model",
                "m",
                "--shards",
                "a",
                "--out",
                "o",
                "--patch-sizes",
                "8",
                "--max-tokens",
                "9",
            ],
            "give patch sizes or --max-tokens, not both",
        ),
        (["index.py", "--help"], "--index-type"),
        (
            ["index.py", "--out", "o", "--embeddings", "e", "--fit", "aspect"],
            "--fit needs --images",
        ),
        (["index.py", "--out", "/no/index"], "nothing to do"),
        (["index.py", "--out", "/no/index", "--delete", "3"], "there is no folder /no/index"),
        (["index.py", "--out", "o", "--embeddings", "/no"], "there is no folder /no"),
        (
            ["index.py", "--out", "o", "--embeddings", "e", "--patch-sizes", "28"],
            "--patch-sizes needs --images or --regions; embeddings have theirs",
        ),
        (
            ["index.py", "--out", "o", "--embeddings", "e", "--on-error", "raise"],
            "--on-error needs --images",
        ),
        (
            ["index.py", "--out", "o", "--delete", "17", "--index-type", "hnsw"],
            "--index-type needs --images or --embeddings without --add or --compact",
        ),
        (
            ["index.py", "--out", "o", "--embeddings", "e", "--add", "--model", "m"],
            "--model needs --images or --embeddings without --add",
        ),
        (
            ["index.py", "--out", "milvus:http://x/a", "--embeddings", "e", "--memory-gib", "4"],
            "--memory-gib is for a folder",
        ),
        (
            ["index.py", "--out", "o", "--embeddings", "e", "--memory-gib", "-1"],
            "error: --memory-gib -1: at least 0",
        ),
        (
            ["index.py", "--out", "o", "--embeddings", "e", "--latency-ms", "-1"],
            "error: --latency-ms -1: above 0",
        ),
        (["index.py", "--out", "o", "--images", "/no", "--model", "m"], "/no is no folder"),
        (["index.py", "--out", "o", "--images", ".", "--model", "/no"], "no model at '/no'"),
        (["index.py", "--out", "o", "--embeddings", "e", "--prune"], "--prune needs --images"),
        (["search.py", "--help"], "usage"),
        (["search.py", "a cat", "--index", "/no"], "there is no folder /no"),
        (["search.py", "typo.png", "--index", "/no"], "typo.png: there is no such image"),
        (["search.py", "a", "--index", "i", "--max-tokens", "0"], "allowed are 1 and more"),
        (
            ["search.py", "a", "--index", "i", "--max-tokens", "9", "--max-ms", "3"],
            "give --max-tokens, or --max-gflops and --max-ms, not both",
        ),
        (
            ["search.py", __file__, "--index", "i", "--box", "0", "0", "0.5", "0.5"],
            "--box is for images",
        ),
        (
            ["search.py", "a", "--index", "i", "--box", "0", "0", "2", "1"],
            "four numbers from 0 to 1",
        ),
        (
            ["search.py", "a", "--index", "i", "--regions", "--words", "0.5"],
            "--regions are found by one vector",
        ),
        (["serve.py", "--help"], "usage"),
        (["serve.py", "--idnex", "/no"], "--idnex"),
        (["serve.py", "--index", "/no"], "there is no folder /no"),
        (["serve.py", "--index", "/a/x", "/b/x"], "--index: two folders of one name (x, x)"),
        (["serve.py", "--index", "/no", "--token-file", "/no"], "--token-file /no: cannot be read"),
        (["zeroshot.py", "--help"], "usage"),
        (["zeroshot.py", "--modle", "m", "--root", "."], "--modle"),
        (["zeroshot.py", "--model", "m", "--root", "/no"], "/no is not a folder"),
        (
            ["zeroshot.py", "--model", "m", "--root", ".", "--max-tokens", "-1"],
            "--max-tokens -1: allowed are 1 and more",
        ),
        (["zeroshot.py", "--model", "m", "--root", ".", "--dataset", "x"], "unknown data set 'x'"),
        (["zeroshot.py", "--model", "/no", "--root", "launch", "--dataset", "shards"], "no *.tar"),
        (["segment.py", "--model", "m", "--root", "/no"], "/no is not a folder"),
        (["segment.py", "--model", "m", "--root", "launch"], "holds no set with masks or boxes"),
        (["segment.py", "--model", "m", "--root", ".", "--dataset", "x"], "unknown data set 'x'"),
        (["segment.py", "--model", "m", "--root", ".", "--patch-sizes", "0"], "--patch-sizes"),
        (["segment.py", "--model", "m", "--root", ".", "--background", "2"], "a cosine, -1 to 1"),
    ],
)
def test_mistakes_are_told_at_once(arguments: list[str], words: str) -> None:
    done = run(*arguments)
    assert done.stdout.splitlines()[-1].split() == ["loaded:"]
    assert done.returncode == (0 if "--help" in arguments else 2)
    said = " ".join((done.stdout + done.stderr).split())
    assert words in said
    assert "Traceback" not in said


def test_a_model_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    manifest = {
        "format": 1, "image_fingerprint": "", "text_fingerprint": "", "model": "/no",
        "width": 3, "patch_sizes": [28], "partitions": [],
    }  # fmt: skip
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    done = run("index.py", "--out", "o", "--embeddings", str(tmp_path), "--kind", "ivf")
    assert done.stderr.splitlines() == [
        "--kind is called --index-type now",
        "error: no model at '/no'; name a folder with config.json and model.safetensors, or a "
        "CLIP or SigLIP: open_clip:ARCHITECTURE@FILE, open_clip:local-dir:FOLDER, "
        "transformers:FOLDER",
    ]
    assert done.stdout.split() == ["loaded:"]
