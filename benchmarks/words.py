"""Words and vectors together: what each finds alone, what they find fused, and what words cost.

    python benchmarks/words.py

The demo's index: 5,804 drawings with captions, keys for file names (runs the demo first where that
has not been done). Queries: 1,000 captions; the same with one word misspelt (a letter changed, left
out or added, or two neighbours exchanged); 1,000 keys; and all of these mixed. A query's right
answers are all drawings of that caption, or the one of that key; recall is the share of them. A
fourth kind shows what fusing costs where words cannot help: captions asked of an index in which
their drawings, half of all, have none. Time and size: 100,000 texts, the captions repeated, each
with a key of its own.
"""

import argparse
import json
import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from lib.harness import ROOT, Target, finish, interleave, run_demo
from retrieval import Searcher, build_index
from retrieval.embed.partitions import metadata_file
from retrieval.search.fusion import LEAST_SHARE, OF_BEST
from retrieval.words.fill import write_words
from retrieval.words.ranking import TextIndex, TextSegment
from retrieval.words.text_file import open_words

K = 10
WEIGHTS = (0.0, 0.3, 0.5, 0.7, 0.9, 1.0)  # of words; 0: vectors alone, 1: words alone
WEIGHT = 0.9  # the one that is promised for
LETTERS = "abcdefghijklmnopqrstuvwxyz"
MEASURED = 100_000  # texts


def misspelt(text: str, draw: random.Random) -> str:
    """One edit in a word of four letters or more; the same where there is none."""
    words = text.split(" ")
    long = [n for n, word in enumerate(words) if len(word) >= 4 and word.isalpha()]
    if not long:
        return text
    number = draw.choice(long)
    word, at = words[number], draw.randrange(len(words[number]) - 1)
    letter = draw.choice([one for one in LETTERS if one not in word[at : at + 2]])
    changed = {
        "changed": word[:at] + letter + word[at + 1 :],
        "left out": word[:at] + word[at + 1 :],
        "added": word[:at] + letter + word[at:],
        "exchanged": word[:at] + word[at + 1] + word[at] + word[at + 2 :],
    }
    words[number] = draw.choice([other for other in changed.values() if other != word])
    return " ".join(words)


def recall(found: list[list[Any]], right: list[set[int]]) -> float:
    """Mean share of the right answers among the first ten, of those that fit there."""
    pairs = zip(found, right, strict=True)
    return float(
        np.mean([len({hit.id for hit in row} & ids) / min(K, len(ids)) for row, ids in pairs])
    )


def recalls(searcher: Searcher, queries: list[str], right: list[set[int]]) -> dict[str, float]:
    """Recall at ten per weight of words."""
    parts = [queries[at : at + 256] for at in range(0, len(queries), 256)]
    embeds = [searcher.model.encode_text(part).float().cpu().numpy() for part in parts]
    found: dict[str, float] = {}
    for weight in WEIGHTS:
        hits = []
        for part, vectors in zip(parts, embeds, strict=True):
            texts = [[(query, 1.0)] for query in part]
            hits += searcher.search_embeds(vectors, K, words=weight, texts=texts)
        found[f"{weight:g}"] = recall(hits, right)
    return found


def without_captions(embeddings: Path, hidden: set[str], out: Path) -> Path:
    """Embeddings whose drawings of the hidden captions have none."""
    shutil.copytree(embeddings, out)
    manifest = json.loads((out / "manifest.json").read_text())
    for number, partition in enumerate(manifest["partitions"]):
        file = metadata_file(out, number)
        table = pq.read_table(file)
        captions = ["" if text in hidden else text for text in table["caption"].to_pylist()]
        at = table.schema.get_field_index("caption")
        pq.write_table(table.set_column(at, "caption", pa.array(captions, pa.string())), file)
        partition.get("blake2b", {}).pop("metadata", None)
    manifest.pop("blake2b", None)
    (out / "manifest.json").write_text(json.dumps(manifest))
    return out


def cost(queries: dict[str, list[str]], captions: list[str], folder: Path) -> dict[str, Any]:
    """Of the texts alone: seconds to write, MiB, and ms a query, the first time and again."""
    texts = [captions[n % len(captions)] for n in range(MEASURED)]
    keys = [f"photos-{n // 1000:04d}/img-{n:08d}" for n in range(MEASURED)]
    table = pa.table({"key": keys, "caption": texts})
    written, noted = [], {}
    for _ in range(3):
        start = time.perf_counter()
        noted = write_words(folder / "words.sqlite", table)
        written.append(time.perf_counter() - start)
    words = open_words(folder / "words.sqlite", noted)
    index = TextIndex([TextSegment(words, np.arange(MEASURED), np.ones(MEASURED, bool))])
    start = time.perf_counter()
    index.match([("an opening", 1.0)])
    figures: dict[str, Any] = {
        "texts": MEASURED,
        "write_s": {"median": float(np.median(written)), "all": written},
        "mib": noted["bytes"] / 2**20,
        "first_query_ms": 1e3 * (time.perf_counter() - start),
    }
    for kind, asked in (*queries.items(), ("keys of these texts", keys[::100])):
        for turn in ("first time", "again"):
            ms = []
            for query in asked[:300]:
                start = time.perf_counter()
                index.match([(query, 1.0)], least_share=LEAST_SHARE, of_best=OF_BEST)
                ms.append(1e3 * (time.perf_counter() - start))
            p50, p95 = np.percentile(ms, (50, 95)).tolist()
            figures.setdefault("query_ms", {}).setdefault(kind, {})[turn] = {"p50": p50, "p95": p95}
    return figures


def search_ratio(searcher: Searcher, queries: list[str], rounds: int) -> dict[str, Any]:
    """How long one search takes with words, over without, the text tower left out."""
    embeds = searcher.model.encode_text(queries).float().cpu().numpy()

    def ask(words: float) -> None:
        for query, vector in zip(queries, embeds, strict=True):
            searcher.search_embeds(vector[None], K, words=words, texts=[[(query, 1.0)]])

    timings = interleave({"vectors": lambda: ask(0.0), "fused": lambda: ask(WEIGHT)}, rounds)
    ms = {name: 1e3 * timings.median(name) / len(queries) for name in ("vectors", "fused")}
    low, high = np.percentile(timings.round_ratios("fused", "vectors"), (25, 75)).tolist()
    return {
        **{f"{name}_ms": value for name, value in ms.items()},
        "ratio": timings.ratio("fused", "vectors"),
        "ratio_quartiles": [low, high],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--embeddings", default=str(ROOT / "runs" / "embeddings"))
    parser.add_argument("--model", default=str(ROOT / "runs" / "demo" / "model"))
    parser.add_argument("--queries", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    if not Path(args.embeddings).is_dir():
        run_demo()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        build_index(args.embeddings, folder / "index", args.model, "flat", "cpu")
        searcher = Searcher.load(folder / "index", device="cpu")
        rows = searcher.rows(searcher.snapshot.ids().tolist())
        of_caption: dict[str, set[int]] = {}
        for row in rows:
            if row["caption"]:
                of_caption.setdefault(row["caption"], set()).add(row["id"])
        captions, draw = sorted(of_caption), random.Random(0)
        draw.shuffle(captions)
        asked = captions[: args.queries]
        keyed = draw.sample(rows, args.queries)
        queries = {
            "captions": asked,
            "captions, one word misspelt": [misspelt(text, draw) for text in asked],
            "keys": [row["key"] for row in keyed],
        }
        right = [of_caption[text] for text in asked]
        answers = [right, right, [{row["id"]} for row in keyed]]
        found = {
            kind: recalls(searcher, texts, ids)
            for (kind, texts), ids in zip(queries.items(), answers, strict=True)
        }
        weights = [f"{weight:g}" for weight in WEIGHTS]
        mix = {w: float(np.mean([of[w] for of in found.values()])) for w in weights}

        hidden = set(captions[: len(captions) // 2])
        fewer = without_captions(Path(args.embeddings), hidden, folder / "fewer")
        build_index(fewer, folder / "without", args.model, "flat", "cpu")
        without = Searcher.load(folder / "without", searcher.model, device="cpu")
        wordless = [text for text in asked if text in hidden]
        unaided = recalls(without, wordless, [of_caption[text] for text in wordless])
        figures = {
            "images": len(rows),
            "queries": {kind: len(texts) for kind, texts in queries.items()},
            "changed_by_misspelling": sum(
                a != b for a, b in zip(asked, queries["captions, one word misspelt"], strict=True)
            ),
            "recall_at_10_by_weight": {**found, "mixed": mix},
            "recall_at_10_where_the_right_have_no_caption": {"queries": len(wordless), **unaided},
            "search": search_ratio(searcher, asked[:100], args.rounds),
            "cost": cost(queries, captions, folder),
        }
    print(json.dumps(figures, indent=1))
    chosen = f"{WEIGHT:g}"
    targets = [
        Target(
            f"{kind}: fused below the better alone", "<= 0.01", max(of["0"], of["1"]) - of[chosen]
        )
        for kind, of in found.items()
    ]
    targets += [
        Target("mixed: fused above vectors alone", ">= 0.0001", mix[chosen] - mix["0"]),
        Target("mixed: fused above words alone", ">= 0.0001", mix[chosen] - mix["1"]),
    ]
    finish("words", figures, targets)


if __name__ == "__main__":
    main()
