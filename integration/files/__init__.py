"""What lies behind descriptors, captured from real processes and rebuilt in a seed."""
