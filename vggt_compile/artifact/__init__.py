"""A model, rewritten by a plan and compiled ahead of time, as one file that runs where this package is not."""
