"""The demo's program: counts primes with four threads, and says every tenth of a second how far.

Usage: primes.py PROGRESS_FILE
"""

import sys
import threading
import time

N_THREADS = 4
BLOCK = 5_000

lock = threading.Lock()
next_block = 0
n_primes = 0
done_blocks: set[int] = set()


def is_prime(number: int) -> bool:
    if number < 2:
        return False
    divisor = 2
    while divisor * divisor <= number:
        if number % divisor == 0:
            return False
        divisor += 1
    return True


def work() -> None:
    global next_block, n_primes
    while True:
        with lock:
            block = next_block
            next_block += 1
        found = sum(is_prime(number) for number in range(block * BLOCK, (block + 1) * BLOCK))
        with lock:
            n_primes += found
            done_blocks.add(block)


def main() -> None:
    # Some memory that hardly changes, so that a delta has something to leave out.
    ballast = [bytes([i % 251]) * 4096 for i in range(16_384)]
    for _ in range(N_THREADS):
        threading.Thread(target=work, daemon=True).start()
    with open(sys.argv[1], "a", encoding="ascii") as progress:
        tick = 0
        while True:
            with lock:
                print(
                    f"tick {tick}: {n_primes} primes in {len(done_blocks)} blocks"
                    f" ({len(ballast)} pages of ballast)",
                    file=progress,
                    flush=True,
                )
            tick += 1
            time.sleep(0.1)


if __name__ == "__main__":
    main()
