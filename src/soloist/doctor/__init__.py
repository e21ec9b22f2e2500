"""Is this machine fit for the plan? Facts of the machine, checks on them, and measurements beside expectations."""
