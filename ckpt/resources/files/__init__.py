"""What is behind file descriptors: one module per kind of open file description.

`table` is the resource that the engine sees: it finds the descriptions of a process, asks the
kinds, and puts descriptors back under their numbers. `kind` says what a kind must offer.
"""
