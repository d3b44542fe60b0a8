"""`python -m benchmarks.machine_code`."""

import sys

from maect_fast.benchmarks.machine_code.cli import main

if __name__ == "__main__":
    sys.exit(main())
