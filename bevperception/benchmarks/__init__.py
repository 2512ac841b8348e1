"""Measurements of speed and memory: programs for tools/benchmark.py."""
