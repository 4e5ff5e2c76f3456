"""The matvec that reads only the columns that are kept: how much faster than the dense one it is, if it is."""
