"""A workload that cannot run twice unnoticed: `python counting.py LOG PORT MIB`.

Each step appends its number and the name of the host to a file that both hosts have, and checks
memory that the steps before have written. Whoever connects is answered with the same bytes.
"""

import os
import select
import socket
import sys
from array import array

N_WORDS = 1 << 19
STRIDE = 512


def main():
    log, port = sys.argv[1], int(sys.argv[2])
    words = array("Q", bytes(8 * N_WORDS))
    # To be heavy, and no less so compressed.
    ballast = os.urandom(int(sys.argv[3]) << 20)
    server = socket.create_server(("", port))
    taken, _ = server.accept()
    step = 0
    while True:
        readable, _, _ = select.select([taken], [], [], 0.002)
        if readable:
            word = taken.recv(100)
            if not word:
                return len(ballast)
            taken.sendall(word)
        step += 1
        at = step * STRIDE % N_WORDS
        before = step - N_WORDS // STRIDE
        verdict = "ok" if words[at] == max(before, 0) else "broken"
        words[at] = step
        # Opened anew each time: while it is open, nobody may find it longer than it was.
        with open(log, "a") as out:
            out.write(f"{step} {os.uname().nodename} {verdict}\n")


main()
