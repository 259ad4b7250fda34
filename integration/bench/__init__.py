"""What ckpt costs: `make bench`. Figures and no tests: nothing fails because a machine is slow."""
