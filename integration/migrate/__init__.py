"""The channel of a migration between real processes: over loopback, and through ssh."""
