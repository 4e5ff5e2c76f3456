"""Grids of runs: expansion, launching, resuming. No torch."""
