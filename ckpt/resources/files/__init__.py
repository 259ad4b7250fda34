"""What lies behind a file descriptor: one file per kind of open file description."""
