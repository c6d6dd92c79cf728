"""``python -m freezekit.auditing module:factory``: the same as ``freezekit audit``."""

import sys

from freezekit.cli import main

if __name__ == "__main__":
    sys.exit(main(["audit", *sys.argv[1:]]))
