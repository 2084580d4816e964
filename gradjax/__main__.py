"""Run the command line: `python -m gradjax`."""

import sys

from gradjax.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
