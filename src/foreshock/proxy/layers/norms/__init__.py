"""Norms for the named slots of a block."""
