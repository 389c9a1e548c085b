"""The commands of `python -m vggt_compile`, one module each; torch is imported only once a command runs."""
