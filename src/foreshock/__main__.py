"""`python -m foreshock` is the command line."""

import sys

from foreshock.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
