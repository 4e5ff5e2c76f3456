"""What keeps the project: run by `make`."""
