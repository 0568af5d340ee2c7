"""The console script `manticore` and its sub-commands. Nothing heavy is imported before a sub-command is chosen."""

import sys
from importlib import import_module


COMMANDS = {
    "demo": "two small pretrained models become one hybrid: the whole path in a few minutes",
    "plan": "say what a recipe would make and take, from configurations and headers, without downloading weights",
    "build": "make a recipe's hybrid stage by stage, from its components to its repository; what is done is skipped",
    "compose": "cut pretrained components into a supernet, calibrate its projectors, save it",
    "train": "train a saved hybrid: its projectors, its mixture weights, or everything",
    "search": "find the best discrete hybrid, without training or by gradient, under limits on its cost",
    "discretize": "keep one path per block of a saved supernet, with fitted bridges, save it",
    "mad": "train small models, or a small hybrid, on the six synthetic tasks of MAD, and measure them",
    "experiment": "run a grid of models, tasks, learning rates and seeds in parallel; what is finished is skipped",
    "report": "tables with intervals, pictures, and what holds of what was claimed, out of the runs of experiments",
    "push": "push a saved hybrid to the Hub, with its code and card, in one commit",
    "verify": "compare the code that travels with a hybrid with the installed release",
    "evaluate": "loss, perplexity and next-token accuracy of a saved model on texts",
}


def usage() -> str:
    """The text of `manticore --help`."""
    width = max(map(len, COMMANDS))
    lines = ["usage: manticore COMMAND [FILE.yaml | FILE.json] [--option value ...]", "", "commands:"]
    lines += [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join([*lines, "", "manticore COMMAND --help lists the options of a command."])


def main(arguments: list[str] | None = None) -> int:
    """
    Run a sub-command. Returns 0, or 2 after printing `manticore: error: ...` for a ValueError; any other exception
    is a defect and passes through.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] in (["-h"], ["--help"]):
        print(usage())
        return 0
    try:
        if not arguments or arguments[0] not in COMMANDS:
            given = repr(arguments[0]) if arguments else "nothing"
            raise ValueError(f"command: got {given}, allowed are {', '.join(COMMANDS)}.")
        import_module(f".{arguments[0]}", __name__).run(arguments[1:])
    except ValueError as error:
        print(f"manticore: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0
