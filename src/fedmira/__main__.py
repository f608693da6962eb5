"""`python -m fedmira` is the command `fedmira`."""

import sys

from fedmira.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
