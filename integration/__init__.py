"""Real processes, real kernels, the real package."""
