"""`manticore demo`, for those who work in a clone."""

import sys

from manticore_command import main


if __name__ == "__main__":
    sys.exit(main(["demo", *sys.argv[1:]]))
