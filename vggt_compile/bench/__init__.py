"""Benchmarks: every figure in docs/benchmarks comes from here, with the versions and settings that made it."""
