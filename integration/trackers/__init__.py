"""Tests of the trackers with real processes, on this kernel; `kernels/inside/` runs the same logic.

`cases.py` drives one way of changing memory at a time, `writer.py` all of them at once. `truth.py`
holds an image against the memory it was made of, `warm.py` dumps and restores without starting a
Python for each.
"""
