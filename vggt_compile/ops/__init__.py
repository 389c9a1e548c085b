"""Operators: a readable PyTorch reference is the definition, a Triton kernel a second provider of the same function."""
