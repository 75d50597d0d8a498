"""Benchmarks: the plain-PyTorch chains that guard_ops races, and how the race is timed."""
