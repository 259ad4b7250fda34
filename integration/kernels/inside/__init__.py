"""Tests that only make sense inside one of the virtual machines (see the package above)."""
