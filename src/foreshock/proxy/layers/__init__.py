"""Parts of a block that are chosen by name, one file each."""
