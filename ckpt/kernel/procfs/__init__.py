"""/proc/PID: pure parsers (`parse_*`), and the functions that open the files (`read_*`).

One module per kind of file; import from the module itself, so that only what is used is loaded.
A file that is gone, or answers ESRCH, is a target that is gone (`TargetGone`).
"""
