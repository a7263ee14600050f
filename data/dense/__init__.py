"""Pictures with masks, boxes and segments, as published data sets hold them, one module per layout.
Nothing is downloaded or measured here, and nothing imports torch."""
