"""Measuring exported files: runtimes behind one interface, timing, memory, accuracy, and the machine's own state.

Modules: `runners`, `harness`, `memory`, `environment`, `accuracy`, and `bench`, which brings them together.
"""
