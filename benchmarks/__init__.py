"""Benchmarks: each checks correctness first, then times ratios, and records a JSON under results/."""
