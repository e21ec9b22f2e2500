"""A deployment in virtual time: the engine's own scheduler, the planner's cost of a step, and a load."""
