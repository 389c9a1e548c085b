"""Passes: one file an axis or a clean-up. A pass answers a question; the driver in `vggt_compile.rewrite` edits the graph."""
