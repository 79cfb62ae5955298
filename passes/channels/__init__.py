"""The parts of channel pruning: labels and values, the solver, the plan. `propagate_channels` and `prune_channels` use them."""
