"""`manticore search`: components or a supernet -> the best discrete hybrid, and a report of all that were scored."""

from dataclasses import dataclass, field

from .parsing import parse_options, require, require_positive


# What each strategy does, and its cost relative to fine-tuning one hybrid on the same number of tokens.
STRATEGIES = {
    "stitch": "score discrete hybrids with fitted bridges, no training (each less than one evaluation: 8 hybrids "
    "about 0.02 of a fine-tuning on a million tokens)",
    "sweep": "loss on a grid of mixture weights, all frozen, small blocks only (one evaluation per point)",
    "joint": "mixture and weights step together, by `manticore train` (up to K times: all K components run)",
    "gaea": "as joint or darts, exponentiated gradient on the simplex (as its base)",
    "dash": "as joint, with Gumbel noise of falling temperature (as joint)",
    "darts": "mixture and weights step in turn, each on its own split, by `ManticoreTrainer(search_dataset=...)` "
    "in Python (about twice joint)",
    "mad": "programming: joint search on synthetic tasks with fresh stems and heads, components frozen; keeps the "
    "largest weight of each block (a joint step per step, but --program_steps of them for any amount of text)",
}
SEARCHED_HERE = ("stitch", "sweep", "mad")
RELATIVE = (
    "stitch with --halving adds about half a fine-tuning for 8 hybrids (4 of them at 5 %% of the tokens, 2 at 15 %%)"
)


@dataclass
class SearchOptions:
    texts: list[str] = field(
        metadata={
            "help": "bible, python, topics, or .txt/.jsonl files and folders to fit bridges on; without score_texts a "
            "quarter of the rows is held out to score on."
        }
    )
    output_folder: str = field(metadata={"help": "Where the hybrid, its tokenizer and the folder `report` go."})
    model: str | None = field(default=None, metadata={"help": "Folder or repository of a supernet."})
    components: list[str] | None = field(
        default=None, metadata={"help": "Instead of model: repositories or local folders, two or more."}
    )
    num_blocks: int | None = field(default=None, metadata={"help": "With components: cut each evenly in so many."})
    strategy: str = field(
        default="stitch",
        metadata={"help": "; ".join(f"{name}: {text}" for name, text in STRATEGIES.items()) + ". " + RELATIVE + "."},
    )
    score_texts: list[str] | None = field(default=None, metadata={"help": "Held-out texts to score on."})
    rows: int = field(default=256, metadata={"help": "Rows of each of the two kinds of text."})
    row_length: int = field(default=128, metadata={"help": "Tokens per row."})
    batch_size: int = field(default=8, metadata={"help": "Rows per batch."})
    limit: int | None = field(
        default=None, metadata={"help": "Score all hybrids up to so many (256; sweep: 1024 points)."}
    )
    beam: int = field(default=8, metadata={"help": "Beginnings kept at every block when there are more hybrids."})
    keep: int = field(default=5, metadata={"help": "Hybrids in the printed table."})
    order: str = field(default="parallel", metadata={"help": "parallel or sequential bridges while scoring."})
    divisions: int = field(default=4, metadata={"help": "Of strategy sweep: weights are multiples of 1/divisions."})
    halving: bool = field(
        default=False, metadata={"help": "Fine-tune the best half and quarter a little, rank again."}
    )
    halving_tokens: int = field(default=1_000_000, metadata={"help": "The whole budget that 5 and 15 %% are of."})
    halving_learning_rate: float = field(default=3e-4, metadata={"help": "Of those runs."})
    tasks: list[str] = field(
        default_factory=lambda: ["in-context-recall"],
        metadata={"help": "Of strategy mad: TASK or TASK=WEIGHT; `manticore mad` has the same tasks."},
    )
    task_length: int | None = field(default=None, metadata={"help": "Of strategy mad: tokens per row; default MAD's."})
    program_steps: int = field(default=200, metadata={"help": "Of strategy mad: optimizer steps."})
    max_attention_blocks: int | None = field(default=None, metadata={"help": "Limit: blocks with attention."})
    max_parameters: int | None = field(default=None, metadata={"help": "Limit: parameters."})
    max_cache_bytes_per_token: int | None = field(default=None, metadata={"help": "Limit: KV-cache growth."})
    max_flops_per_token: float | None = field(default=None, metadata={"help": "Limit: FLOPs per token."})
    context: int | None = field(default=None, metadata={"help": "Context at which FLOPs are counted; at most 2048."})
    cache_folder: str | None = field(default=None, metadata={"help": "Default ~/.cache/manticore."})


def run(arguments: list[str]) -> None:
    """
    Raises:
        ValueError: bad options, components, texts, or limits that no hybrid meets.
    """
    (options,) = parse_options(SearchOptions, arguments, "search", __doc__)
    require_positive(
        options,
        "num_blocks",
        "rows",
        "row_length",
        "batch_size",
        "limit",
        "beam",
        "keep",
        "divisions",
        "halving_tokens",
        "task_length",
        "program_steps",
    )
    require((options.model is None) != (options.components is None), "model, components: give exactly one of the two.")
    require(
        options.components is None or options.num_blocks is not None,
        "num_blocks: got None, allowed with components is a positive integer.",
    )
    if options.strategy not in SEARCHED_HERE:
        _refuse_strategy(options.strategy)

    from .. import Budget, HalvingOptions, calibrate, discretize, program, stitch, sweep
    from ..search.programming_data import task_weights
    from .models import check_output, load_tokenizer

    tasks = task_weights(_tasks(options.tasks))
    budget = Budget(
        **{name: getattr(options, name) for name in Budget.__dataclass_fields__ if getattr(options, name) is not None}
    )
    halving = HalvingOptions(options.halving_tokens, learning_rate=options.halving_learning_rate)
    folder = check_output(options.output_folder)
    model = _supernet(options)
    tokenizer = load_tokenizer(options.model or options.components[0])
    calibration, scored = _texts(options, tokenizer)
    if options.strategy in ("sweep", "mad") and options.components:
        print(calibrate(model, calibration, batch_size=options.batch_size))
    if options.strategy == "mad":
        settings = {task: {"sequence_length": options.task_length} for task in tasks if options.task_length}
        report = program(
            model, tasks, settings=settings, steps=options.program_steps, folder=folder / "report", apply=True
        )
        result = discretize(
            model, "argmax", calibration, order=options.order, batch_size=options.batch_size, budget=budget
        )
        kind = "hybrid"
    elif options.strategy == "sweep":
        report = sweep(
            model,
            scored,
            divisions=options.divisions,
            limit=options.limit or 1024,
            folder=folder / "report",
            batch_size=options.batch_size,
        )
        model.set_mixture_weights(report.best.weights)
        result, kind = model, "supernet with the best weights"
    else:
        report = stitch(
            model,
            calibration,
            scored,
            limit=options.limit or 256,
            beam=options.beam,
            keep=options.keep,
            order=options.order,
            budget=budget,
            halving=halving if options.halving else False,
            folder=folder / "report",
            batch_size=options.batch_size,
            context=options.context,
        )
        result = discretize(
            model, report.best.choice, calibration=calibration, order=options.order, batch_size=options.batch_size
        )
        kind = "hybrid"
    print(report)
    print(result.describe())
    result.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"The {kind} is in {folder}, the report in {folder / 'report'}")


def _refuse_strategy(name: str) -> None:
    from ..search.strategy import STRATEGIES as trained

    require(
        name not in trained and name not in STRATEGIES,
        f"strategy: {name!r} trains the supernet: manticore train --stage search --strategy {name}; allowed here are "
        f"{', '.join(map(repr, SEARCHED_HERE))}.",
    )
    raise ValueError(f"strategy: got {name!r}, allowed are {', '.join(map(repr, SEARCHED_HERE))}.")


def _tasks(words: list[str]) -> dict[str, float]:
    """Weights of MAD tasks from TASK and TASK=WEIGHT."""
    tasks = {}
    for word in words:
        task, _, weight = word.partition("=")
        try:
            tasks[task] = float(weight or 1)
        except ValueError as error:
            raise ValueError(f"tasks: got {word!r}, allowed are TASK and TASK=WEIGHT.") from error
    return tasks


def _supernet(options: SearchOptions):
    from .. import ManticoreForCausalLM
    from .models import load_hybrid

    if options.components is None:
        return load_hybrid(options.model)
    import torch

    model = ManticoreForCausalLM.from_components(options.components, num_blocks=options.num_blocks)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _texts(options: SearchOptions, tokenizer):
    """Rows to fit bridges on and rows to score on, disjoint, each (rows, row_length)."""
    import torch

    from .models import rows_of

    wanted = options.rows if options.score_texts else options.rows + -(-options.rows // 3)
    rows = rows_of(options.texts, tokenizer, options.row_length, wanted, options.cache_folder)
    if options.score_texts:
        return rows, rows_of(options.score_texts, tokenizer, options.row_length, options.rows, options.cache_folder)
    require(len(rows) >= 8, f"texts: got {len(rows)} rows of {options.row_length} tokens, allowed is at least 8.")
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    held_out = len(rows) // 4
    return rows[held_out:], rows[:held_out]
