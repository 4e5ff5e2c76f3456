"""Ways to fit affine maps, one file each; the file name is the key."""
