"""Activations and hidden sizes of the MLP."""
