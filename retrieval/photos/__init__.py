"""A folder of photos as an index: which photos it holds, and what of them is new, changed or gone.
How vectors are stored and searched is `retrieval.index`'s."""
