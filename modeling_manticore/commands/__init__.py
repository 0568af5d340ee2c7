"""The console script `manticore` and its sub-commands. Nothing heavy is imported before a sub-command is chosen."""

import sys
from importlib import import_module
from logging import LogRecord, getLogger

from .. import __version__, before_loading, when_loaded


COMMANDS = {
    "demo": "make one hybrid out of two small pretrained models: the whole path in a few minutes",
    "plan": "say what a recipe would make and take, without downloading weights",
    "build": "make a recipe's hybrid stage by stage, from its components to its repository; what is done is skipped",
    "compose": "cut pretrained components into a supernet, calibrate its projectors, save it",
    "train": "train a saved hybrid: its projectors, its mixture weights, or everything",
    "search": "find the best discrete hybrid, without training or by gradient, under limits on its cost",
    "discretize": "keep one path per block of a saved supernet, fit its bridges, save it",
    "describe": "tell the architecture of a saved hybrid: slices, bridges, sizes",
    "evaluate": "measure loss, perplexity and next-token accuracy of a saved model on texts",
    "mad": "train small models, or a small hybrid, on the six synthetic tasks of MAD, and measure them",
    "experiment": "run a grid of models, tasks, learning rates and seeds in parallel; what is finished is skipped",
    "report": "make tables with intervals, pictures, and what holds of what was claimed, of experiments' runs",
    "push": "push a saved hybrid to the Hub, with its code and card, in one commit",
    "verify": "compare the code that travels with a hybrid with that of the installed release",
    "space": "push a Gradio Space in which a hybrid can be tried in a browser",
    "completion": "print a completion script for bash, zsh or fish",
}
POSITIONAL = {
    "plan": "RECIPE",
    "build": "RECIPE",
    "describe": "MODEL",
    "evaluate": "MODEL",
    "push": "FOLDER REPO_ID",
    "verify": "SOURCE",
    "space": "REPO",
    "experiment": "FILE.yaml",
    "report": "FILE.yaml ...",
    "completion": "SHELL",
}
OWN_FILE = ("plan", "build", "experiment", "report")  # their first word is no settings file
KERNELS = "transformers.integrations.hub_kernels"  # the logger
NOTHING = "Nothing was written; the same command starts again."
RESUME = {
    "demo": "Components that were trained are kept; the same command goes on with the rest.",
    "build": "Finished stages are kept; the same command goes on with the one that was stopped.",
    "search": "At most the folder report was written; the same command starts again, with --halving from the "
    "fine-tunings in it.",
    "train": "No training had begun; the same command starts again.",
    "mad": "Finished settings are in the output file; the same command goes on with the rest.",
    "experiment": "Finished runs are kept; the same command goes on with the rest.",
    "push": "The repository is as it was or has the whole commit; the same command tries again.",
    "space": "The Space is as it was or has the whole commit; the same command tries again.",
}
ENDING = """
manticore COMMAND --help lists the options of a command, manticore --version tells
the release. A settings file has the same names, without the dashes; options
after it win. Texts, trained components and finished runs are kept in the folder
manticore of $XDG_CACHE_HOME, else of ~/.cache.

Exit codes: 0 done; 1 the task failed (the Hub, the network, the disk, a check
that did not pass); 2 bad usage (an option, a file or a model that is not
allowed); 130 stopped by Ctrl-C, which leaves nothing half-written and says how
to go on. Errors are one line on standard error.

Progress is shown on standard error, as bars on a terminal and else as a line
now and then. For completion: eval "$(manticore completion bash)"
"""


def usage() -> str:
    """The text of `manticore --help`."""
    width = max(map(len, COMMANDS))
    lines = ["usage: manticore COMMAND [FILE.yaml | FILE.json] [--option value ...]", "", "commands:"]
    lines += [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    return "\n".join(lines) + "\n" + ENDING.rstrip()


def main(arguments: list[str] | None = None) -> int:
    """
    Run a sub-command and return its exit code, after printing `manticore: error: ...` in one line where it failed: 0,
    1 or 2 as `usage` says, 130 after Ctrl-C. Any other exception is a defect and passes through.
    """
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] in (["-h"], ["--help"]):
        print(usage())
        return 0
    if arguments[:1] == ["--version"]:
        print(f"manticore {__version__}")
        return 0
    try:
        if not arguments or arguments[0] not in COMMANDS:
            from .parsing import meant

            given = repr(arguments[0]) if arguments else "nothing"
            allowed = f"allowed are {', '.join(COMMANDS)}."
            raise ValueError(
                f"command: got {given}, {meant(arguments[0], COMMANDS, allowed) if arguments else allowed}"
            )
        _plain_without_terminal()
        getLogger(KERNELS).addFilter(_says_something_to_do)
        import_module(f".{arguments[0]}", __name__).run(arguments[1:])
        sys.stdout.flush()
    except ValueError as error:
        return _failed(error, getattr(error, "exit_code", 2))
    except BrokenPipeError:  # who reads our output has seen enough
        sys.stdout = None
        return 0
    except OSError as error:
        return _failed(error, 1)
    except KeyboardInterrupt as stop:
        print(f"\nmanticore: stopped. {str(stop) or RESUME.get(arguments[0], NOTHING)}", file=sys.stderr)
        return 130
    return 0


def _failed(error: Exception, code: int) -> int:
    print(f"manticore: error: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _says_something_to_do(record: LogRecord) -> bool:
    """False of advice to install kernels that only a GPU runs, where there is none."""
    import torch

    return torch.cuda.is_available() or "falling back to its reference PyTorch" not in record.getMessage()


def _plain_without_terminal() -> None:
    """
    No bars of transformers where nobody watches, as soon as it is there; ours are lines then. On a terminal, a word
    that loading it has begun, which takes seconds.
    """

    def plain() -> None:
        from transformers.utils import logging

        logging.disable_progress_bar()

    if sys.stderr.isatty():
        if "transformers" not in sys.modules:
            before_loading.append(lambda: _tell("Loading torch and transformers ..."))
            when_loaded.append(lambda: _tell("\r\033[K"))
    elif "transformers" in sys.modules:
        plain()
    else:
        when_loaded.append(plain)


def _tell(text: str) -> None:
    sys.stderr.write(text)
    sys.stderr.flush()
