"""What is moved to prove that moving works: each module starts a service, moves it, and judges.

Each has one function `check(hosts, move, directory, ...)`: it begins on the host that has the
address, calls `move` some times, raises if anything was lost, and returns figures.
"""
