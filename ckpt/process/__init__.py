"""A stopped process and what one may do to it: freeze, remote syscalls, arena, seed, keeper."""
