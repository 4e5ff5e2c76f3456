"""Tokens: sources, tokenizers, cache, batches. No torch."""
