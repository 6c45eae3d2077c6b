"""Benchmarks: one module a question. Run one with ``python -m benchmarks.NAME --json FILE``."""
