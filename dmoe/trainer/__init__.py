"""Training runs: the root configuration, building, the loop, one step, and what happens beside."""
