"""Sweeps, their reports, and the benchmark's targets."""
