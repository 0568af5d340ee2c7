"""`manticore mad`: train small models on the six synthetic tasks of MAD (arXiv 2403.17844) and measure them."""

from dataclasses import dataclass, field

from .parsing import parse_options, require


@dataclass
class MadOptions:
    output_file: str = field(metadata={"help": "Results as JSON, after every setting; an interrupted run continues."})
    preset: str = field(
        default="cpu",
        metadata={"help": "cpu: the six tasks, small, in minutes; paper: the whole grid (prints its cost first)."},
    )
    architecture: str = field(
        default="hybrid", metadata={"help": "What is trained: gpt_neox, mamba2 or hybrid (half of each)."}
    )
    tasks: list[str] | None = field(default=None, metadata={"help": "Only these tasks (default: the preset's)."})
    epochs: int | None = field(default=None, metadata={"help": "Epochs of every run (default: the preset's)."})
    seed: int = field(default=0, metadata={"help": "Seed of the rows, the weights and the order of rows."})
    yes: bool = field(default=False, metadata={"help": "Start the preset paper without a question."})


KINDS = (MadOptions,)


def run(arguments: list[str]) -> None:
    """
    Raises:
        ValueError: bad options, or the preset paper without --yes.
    """
    (options,) = parse_options(KINDS, arguments, "mad")
    require(options.seed >= 0, f"seed: got {options.seed}, allowed is an integer of at least 0.")

    from ..tasks.mad.protocol import preset_of, run_mad

    preset = preset_of(options.preset, options.tasks, options.epochs)
    cost = preset.cost()
    sizes = [f"{cost[name]:,} {name}" for name in ("settings", "runs", "steps")]
    print(f"{', '.join(sizes)}, {cost['tokens']:,} tokens of training")
    require(
        options.preset != "paper" or options.yes,
        f"yes: not given, and the preset 'paper' is {cost['runs']} runs over {cost['tokens']:,} tokens; add --yes.",
    )
    result = run_mad(preset, options.architecture, options.seed, options.output_file)
    width = max(map(len, result["scores"]))
    for task, score in result["scores"].items():
        print(f"{task:<{width}}  {100 * score:5.1f} %")
    print(f"{'mean':<{width}}  {100 * result['mean']:5.1f} %   ({options.architecture}; {options.output_file})")
