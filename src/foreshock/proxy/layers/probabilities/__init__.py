"""What turns attention scores into weights."""
