"""The console script `manticore`. Help, version and wrong usage are answered before torch or transformers load."""

import os
import sys


# Before torch loads: its threads else wait for one another in a loop, which on a machine with other work to do makes
# them many times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def main(arguments: list[str] | None = None) -> int:
    """
    As `modeling_manticore.commands.main`. While this module is imported the package loads its parts when they are
    first asked for, instead of all at once.
    """
    from modeling_manticore.commands import main as run

    return run(arguments)


if __name__ == "__main__":
    import manticore_command  # under its own name, by which the package knows that it is a command

    sys.exit(manticore_command.main())
