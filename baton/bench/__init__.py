"""Benchmarks: each measures one part next to its limit."""
