"""Fast kernels, each with a plain reference beside it."""
