"""What runs over there in the tests of ssh: `remote_receiver.py DIR HANDLER receive --stdio`."""

import sys
from pathlib import Path

from ckpt.errors import CkptError
from ckpt.migrate.stdio import serve_stdio
from tests.migrate import receivers


def main():
    directory, handler, *command = sys.argv[1:]
    assert command == ["receive", "--stdio"]
    # A login shell may print as it likes on the standard error; on the standard output we may not.
    print("hello", file=sys.stderr)
    try:
        return serve_stdio(
            _noisy(getattr(receivers, handler)),
            patience=receivers.PATIENT,
            directory=Path(directory),
        )
    except CkptError as error:
        return error.exit_code


def _noisy(handler):
    def handle(session):
        print("a handler prints")
        return handler(session)

    return handle


if __name__ == "__main__":
    sys.exit(main())
