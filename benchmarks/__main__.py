"""`python -m benchmarks` from the root: the same as `maect-fast bench`, without an install."""

import sys

from maect_fast.benchmarks.cli import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m benchmarks"))
