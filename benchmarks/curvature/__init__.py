"""The curvature tracker: accuracy, cost, memory, and its peers."""
