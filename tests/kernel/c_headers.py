"""What the C headers of this system say: sizes, offsets and numbers, printed by a C program."""

import subprocess
import tempfile
from pathlib import Path


def run_c(headers, statements):
    """Compile `statements` into a main after including `headers`; return what it prints."""
    includes = "\n".join(f"#include <{header}>" for header in ["stddef.h", "stdio.h", *headers])
    source = f"{includes}\nint main(void) {{\n{statements}\nreturn 0;\n}}\n"
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "program"
        subprocess.run(
            ["gcc", "-x", "c", "-D_GNU_SOURCE", "-o", program, "-"],
            input=source,
            text=True,
            check=True,
            capture_output=True,
        )
        return subprocess.run([program], check=True, capture_output=True, text=True).stdout


def read_defines(header):
    """Return all macros that are defined after including `header`: name -> text."""
    out = subprocess.run(
        ["gcc", "-D_GNU_SOURCE", "-E", "-dM", "-x", "c", "-"],
        input=f"#include <{header}>\n",
        text=True,
        check=True,
        capture_output=True,
    ).stdout
    words = (line.split(None, 2)[1:] for line in out.splitlines())
    return {word[0]: word[1] if len(word) > 1 else "" for word in words}


def read_numbers(headers, names):
    """Return the values of those macros of `names` that the headers define."""
    statements = "\n".join(
        f'#ifdef {name}\nprintf("{name} %llu\\n", (unsigned long long)({name}));\n#endif'
        for name in names
    )
    lines = (line.split() for line in run_c(headers, statements).splitlines())
    return {name: int(value) for name, value in lines}


def read_layout(header, c_name, members):
    """Return (size, member -> (offset, size)) of a struct; None if the header has no such one."""
    statements = [f'printf("%zu\\n", sizeof({c_name}));'] + [
        f'printf("%zu %zu\\n", offsetof({c_name}, {member}), sizeof((({c_name} *)0)->{member}));'
        for member in members
    ]
    try:
        size, *rows = run_c([header], "\n".join(statements)).split("\n")[:-1]
    except subprocess.CalledProcessError:
        return None
    pairs = ((int(word) for word in row.split()) for row in rows)
    return int(size), dict(zip(members, (tuple(pair) for pair in pairs), strict=True))
