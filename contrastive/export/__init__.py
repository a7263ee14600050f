"""A model at one patch size in the formats of other libraries."""
