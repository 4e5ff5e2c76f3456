"""What watching costs, beside other tools that watch, where they are installed."""
