"""Benchmarks: each checks correctness, then times ratios, and records a JSON under results/."""
