"""Search for layers: formulas that evolve by tournaments on several small architectures (2004.02967)."""
