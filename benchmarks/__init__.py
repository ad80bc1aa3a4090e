"""Measurements, each with its peer and its floor in the same run: ``python -m benchmarks`` lists them.

A benchmark is a module of this package with a ``main(argv) -> int``. It prints a table for people and, as its last
line, one JSON object ``{"name", "machine", "rows", "ratios"}``. It takes ``--quick`` (less than a minute) and
``--check`` (exit 1, naming it, where a goal is missed).
"""
