"""Pictures of several shapes and patch sizes through one tower, as one sequence of tokens."""
