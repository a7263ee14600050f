"""Search an index by words at its coarsest and at its finest patch size.

    python examples/search_two_patch_sizes.py runs/index "a happy cat" "bad weather"

A text costs the same at any patch size; what differs is the index that answers, and what it cost to
encode its images.
"""

import sys

from retrieval import Searcher


def main(index: str, *queries: str) -> None:
    searcher = Searcher.load(index)
    for patch_size in sorted({max(searcher.patch_sizes), min(searcher.patch_sizes)}, reverse=True):
        gflops = searcher.model.vision.gflops(patch_size)
        print(f"patch size {patch_size}: {len(searcher):,} images at {gflops:.2f} GFLOPs each")
        found = searcher.search(queries, k=5, patch_size=patch_size)
        for query, hits in zip(queries, found, strict=True):
            print(f"  {query}")
            for hit in hits:
                print(f"    {hit.similarity:.3f}  {hit.caption}  [{hit.key}]")


if __name__ == "__main__":
    main(*sys.argv[1:])
