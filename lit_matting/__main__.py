"""``python -m lit_matting``."""

import sys

from lit_matting.cli import main

if __name__ == "__main__":
    sys.exit(main())
