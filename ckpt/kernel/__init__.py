"""The Linux ABI and nothing else: typed system calls, uapi structs, pure /proc parsers."""
