"""Where rows of a watched training go besides its folder, one file each: `foreshock.watch(..., sinks=["wandb"])`."""
