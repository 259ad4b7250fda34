"""Live rounds and twins, on real processes."""
