"""Text to token ids, one file each."""
