"""Tests under other kernels: Debian's, booted in qemu over this machine's own root file system.

The host side (`test_kernels.py`) boots each kernel once and runs the tests of `inside/` there.
`apt.py` finds and fetches packages, `images.py` makes kernels of them, `vm.py` boots one.
"""
