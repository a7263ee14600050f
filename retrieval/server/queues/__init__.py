"""Work that concurrent requests share: forwards and searches, in batches. Knows no HTTP."""
