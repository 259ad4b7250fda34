"""ckpt: incremental checkpoint and restore of Linux processes, from outside the target."""
