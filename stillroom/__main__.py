"""`python -m stillroom` and the `stillroom` command."""

import sys

from stillroom.cli import main

if __name__ == "__main__":
    sys.exit(main())
