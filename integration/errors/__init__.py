"""Bad input: one clear sentence and its exit code, and nothing is changed."""
