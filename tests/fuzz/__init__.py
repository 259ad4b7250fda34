"""Whatever bytes come, each decoder ends in a value or in its own error.

`targets` has one function for each decoder that is given foreign bytes, `seeds` good bytes to begin
with, `test_targets` runs the first on changes of the second, always the same number of them, and
`python -m tests.fuzz` lets atheris look for more (`make fuzz`). `found/TARGET/` keeps bytes that
once came out wrong, or got to where no others did.
"""
