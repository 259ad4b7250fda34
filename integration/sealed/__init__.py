"""Encrypted images of real processes."""
