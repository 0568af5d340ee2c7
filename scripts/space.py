"""`manticore space`, for those who work in a clone."""

import sys

from modeling_manticore.commands import main


if __name__ == "__main__":
    sys.exit(main(["space", *sys.argv[1:]]))
