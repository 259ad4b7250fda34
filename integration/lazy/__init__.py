"""A process runs before its memory is there, and never sees anything but its memory."""
