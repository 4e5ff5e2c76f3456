"""What one run does, one file each."""
