"""Passes: one file an axis or a clean-up. A pass answers a question; the driver edits the graph."""
