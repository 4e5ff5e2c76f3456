"""Transforms of attention scores before the softmax."""
