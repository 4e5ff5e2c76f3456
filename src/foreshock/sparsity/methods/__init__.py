"""Methods of activation sparsity, one file each: what channels are scored by."""
