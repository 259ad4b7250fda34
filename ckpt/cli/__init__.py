"""The commands, one file each: a thin user of the public API; errors become exit codes."""
