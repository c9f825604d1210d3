"""`remoe` and `python -m remoe`: the command line, which the extra `lab` installs."""

import sys

from remoe.lab.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
