"""Dirty-page trackers: how we learn which pages were written since the last generation."""
