"""Programs that others have written, under `ckpt`."""
