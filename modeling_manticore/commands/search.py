"""`manticore search`: components or a supernet -> the best discrete hybrid, and a report of what was found."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .limits import LimitOptions
from .parsing import TEXT_CACHE, parse_options, require, require_positive
from .search_programming import ProgramOptions, task_weights_of
from .search_training import (
    GradientOptions,
    arguments_of,
    check_search_texts,
    search_rows,
    suit,
    train_and_discretize,
)


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .. import Budget, HalvingOptions, ManticoreTrainingArguments


class Strategy(NamedTuple):
    """How `--help` tells a strategy: what it does, and its cost relative to fine-tuning one hybrid."""

    text: str
    cost: str


STRATEGIES = {
    "stitch": Strategy("score discrete hybrids, no training", "0.02 for 8 hybrids"),
    "sweep": Strategy("loss on a grid of mixture weights, no training", "1 evaluation a point"),
    "joint": Strategy("mixture and weights step together", "K: all components run"),
    "gaea": Strategy("joint or darts by exponentiated gradient", "as joint or darts"),
    "dash": Strategy("joint under Gumbel noise, falling temperature", "as joint"),
    "darts": Strategy("mixture and weights in turn, each on its split", "2 x joint"),
    "mad": Strategy("joint on synthetic tasks, components frozen", "a joint step a step"),
}
GRADIENT = ("joint", "gaea", "dash", "darts")
DEFAULT_ROWS = 256


def explanation() -> str:
    """The strategies, one a line of at most 80 columns."""
    width = max(len(strategy.text) for strategy in STRATEGIES.values())
    lines = ["strategies, and their cost in fine-tunings of one hybrid on a million tokens:"]
    lines += [f"  {name:<6}  {text:<{width}}  {cost}" for name, (text, cost) in STRATEGIES.items()]
    lines += [
        "",
        "With --halving, stitch also fine-tunes the best half on 5 % and the best quarter",
        "on 15 % of the tokens: 0.5 for 8 hybrids. stitch and the gradient strategies",
        "save a hybrid within the limits, sweep the supernet with its best weights. The",
        "gradient strategies train the supernet; `manticore train` has more options.",
    ]
    return "\n".join(lines)


@dataclass
class SearchOptions:
    texts: list[str] = field(
        metadata={
            "help": "bible, python, topics, or .txt/.jsonl files and folders to fit bridges and train on; without "
            "score_texts a quarter of the rows is held out to score on."
        }
    )
    output_folder: str = field(metadata={"help": "Where the hybrid, its tokenizer and the folder `report` go."})
    model: str | None = field(default=None, metadata={"help": "Folder or repository of a supernet."})
    components: list[str] | None = field(
        default=None, metadata={"help": "Instead of model: repositories or local folders, two or more."}
    )
    num_blocks: int | None = field(
        default=None, metadata={"help": "With components: cut each evenly into so many blocks."}
    )
    strategy: str = field(default="stitch", metadata={"help": f"{', '.join(STRATEGIES)}; see below."})
    score_texts: list[str] | None = field(default=None, metadata={"help": "Held-out texts to score on."})
    rows: int | None = field(
        default=None,
        metadata={
            "help": f"Rows of each of the two kinds of text (default: {DEFAULT_ROWS}; gradient strategies: as many as "
            "the steps take)."
        },
    )
    row_length: int = field(default=128, metadata={"help": "Tokens per row."})
    batch_size: int = field(default=8, metadata={"help": "Rows per batch."})
    limit: int | None = field(
        default=None, metadata={"help": "Score all hybrids up to so many (default: 256; sweep: 1024 points)."}
    )
    beam: int = field(default=8, metadata={"help": "stitch: beginnings kept at every block beyond the limit."})
    keep: int = field(default=5, metadata={"help": "stitch: hybrids in the printed table."})
    order: str | None = field(
        default=None,
        metadata={"help": "Bridges, parallel or sequential (default: parallel for stitch, else sequential)."},
    )
    calibrate: bool | None = field(
        default=None,
        metadata={
            "help": "Gradient strategies: fit the projectors of new supernets before, and bridges after the search. "
            "Default: only with --train_components false or --order; where components train it gains nothing."
        },
    )
    divisions: int = field(default=4, metadata={"help": "sweep: weights are multiples of 1/divisions."})
    halving: bool = field(
        default=False, metadata={"help": "stitch: fine-tune the best half and quarter a little, rank again."}
    )
    halving_tokens: int = field(
        default=1_000_000, metadata={"help": "stitch: tokens of the whole budget, of which 5 and 15 %% are taken."}
    )
    halving_learning_rate: float = field(
        default=3e-4, metadata={"help": "stitch: learning rate of those fine-tunings."}
    )
    context: int | None = field(
        default=None,
        metadata={
            "help": "stitch: tokens of context at which FLOPs are counted (default: the hybrid's, at most 2048)."
        },
    )
    cache_folder: str | None = field(default=None, metadata={"help": TEXT_CACHE})


@dataclass
class Search:
    """All that a strategy needs: options, limits, the supernet, and rows (rows, row_length) to fit and to score on."""

    options: SearchOptions
    gradient: GradientOptions
    tasks: dict[str, float]
    program: ProgramOptions
    arguments: "ManticoreTrainingArguments | None"
    halving: "HalvingOptions | bool"
    budget: "Budget | None"
    folder: Path
    tokenizer: "PreTrainedTokenizerBase"
    model: "PreTrainedModel"
    rows: "torch.LongTensor"
    scored: "torch.LongTensor"


class Found(NamedTuple):
    """What a strategy hands back: the model to save, what to call it, and a report that prints itself."""

    model: "PreTrainedModel"
    kind: str
    report: Any


KINDS = (SearchOptions, LimitOptions, GradientOptions, ProgramOptions)


def run(arguments: list[str]) -> None:
    """
    Raises:
        ValueError: bad options, components, texts, or limits that no hybrid meets.
    """
    options, limits, gradient, program = parse_options(KINDS, arguments, "search", explanation())
    _check(options, gradient)
    require_positive(program, "task_length", "program_steps")
    tasks = task_weights_of(program)

    from .. import HalvingOptions
    from .models import check_output, load_tokenizer

    budget = limits.budget()
    require(
        budget is None or options.strategy != "sweep",
        f"{', '.join(name for name, value in vars(limits).items() if value is not None)}: given with strategy "
        "'sweep', which keeps the whole supernet; allowed with limits is any other strategy.",
    )
    halving = HalvingOptions(options.halving_tokens, learning_rate=options.halving_learning_rate)
    folder = check_output(options.output_folder)
    training = None
    if options.strategy in GRADIENT:
        training = arguments_of(options.strategy, gradient, folder, options.batch_size)
        check_search_texts(training, gradient.search_texts)
    tokenizer = load_tokenizer(
        options.model or options.components[0], field="model" if options.model else "components[0]"
    )
    model = _supernet(options)
    rows, scored = _texts(options, gradient, tokenizer)
    search = Search(
        options,
        gradient,
        tasks,
        program,
        training,
        options.halving and halving,
        budget,
        folder,
        tokenizer,
        model,
        rows,
        scored,
    )
    found = RUNNERS[options.strategy](search)
    print(found.report)
    print(found.model.describe())
    found.report.write_page(folder / "report", _recipe(search))
    found.model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"The {found.kind} is in {folder}, the report in {folder / 'report'} (report.html)")


def _check(options: SearchOptions, gradient: GradientOptions) -> None:
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
    )
    require_positive(gradient, "steps")
    name = options.strategy
    require(name in RUNNERS, f"strategy: got {name!r}, allowed are {', '.join(map(repr, RUNNERS))}.")
    require((options.model is None) != (options.components is None), "model, components: give exactly one of the two.")
    require(
        options.components is None or options.num_blocks is not None,
        "num_blocks: got None, allowed with components is a positive integer.",
    )
    require(
        options.order in (None, "parallel", "sequential"),
        f"order: got {options.order!r}, allowed are 'parallel' and 'sequential'.",
    )
    require(not options.halving or name == "stitch", f"halving: got True with strategy {name!r}, allowed is 'stitch'.")
    require(
        not gradient.search_texts or name in GRADIENT,
        f"search_texts: given with strategy {name!r}, which trains no mixture; allowed is 'darts', or 'gaea' "
        "on darts.",
    )


def _recipe(search: Search) -> dict[str, Any]:
    """The options that were set, as the settings file that `manticore search` takes."""
    parts = [search.options]
    parts += [search.gradient] if search.options.strategy in GRADIENT else []
    parts += [search.program] if search.options.strategy == "mad" else []
    values = {name: value for part in parts for name, value in vars(part).items() if value is not None}
    limits = {} if search.budget is None else vars(search.budget)
    return values | {name: limit for name, limit in limits.items() if limit is not None}


def _stitch(search: Search) -> Found:
    from .. import discretize, stitch

    options, order = search.options, search.options.order or "parallel"
    report = stitch(
        search.model,
        search.rows,
        search.scored,
        limit=options.limit or 256,
        beam=options.beam,
        keep=options.keep,
        order=order,
        budget=search.budget,
        halving=search.halving,
        folder=search.folder / "report",
        batch_size=options.batch_size,
        context=options.context,
    )
    hybrid = discretize(
        search.model, report.best.choice, calibration=search.rows, order=order, batch_size=options.batch_size
    )
    return Found(hybrid, "hybrid", report)


def _sweep(search: Search) -> Found:
    from .. import sweep

    options = search.options
    _calibrate_new(search)
    report = sweep(
        search.model,
        search.scored,
        divisions=options.divisions,
        limit=options.limit or 1024,
        folder=search.folder / "report",
        batch_size=options.batch_size,
    )
    search.model.set_mixture_weights(report.best.weights)
    return Found(search.model, "supernet with the best weights", report)


def _by_gradient(search: Search) -> Found:
    options, gradient, rows, searched = search.options, search.gradient, search.rows, None
    if check_search_texts(search.arguments, gradient.search_texts):
        rows, searched = search_rows(rows, gradient.search_texts, search.tokenizer, len(rows), options.cache_folder)
    suit(search.model, options.strategy)
    fitted, order = options.calibrate, None
    if fitted is None:
        fitted = options.order is not None or not gradient.train_components
    if fitted:
        _calibrate_new(search)
        order = options.order or "sequential"
    hybrid, report = train_and_discretize(
        search.model, search.arguments, rows, search.scored, searched, search.budget, order
    )
    return Found(hybrid, "hybrid", report)


def _mad(search: Search) -> Found:
    from .. import discretize, program

    options, length = search.options, search.program.task_length
    _calibrate_new(search)
    report = program(
        search.model,
        search.tasks,
        settings={task: {"sequence_length": length} for task in search.tasks} if length else None,
        steps=search.program.program_steps,
        folder=search.folder / "report",
        apply=True,
    )
    hybrid = discretize(
        search.model,
        "argmax",
        search.rows,
        order=options.order or "sequential",
        batch_size=options.batch_size,
        budget=search.budget,
    )
    return Found(hybrid, "hybrid", report)


# A strategy is one entry here, and one in STRATEGIES.
RUNNERS: dict[str, Callable[[Search], Found]] = {
    "stitch": _stitch,
    "sweep": _sweep,
    **dict.fromkeys(GRADIENT, _by_gradient),
    "mad": _mad,
}


def _calibrate_new(search: Search) -> None:
    """Fit the projectors of a supernet that was composed here; one that is loaded stays as it is."""
    from .. import calibrate
    from .search_training import CALIBRATION_ROWS

    if search.options.components:
        print(calibrate(search.model, search.rows[:CALIBRATION_ROWS], batch_size=search.options.batch_size))


def _supernet(options: SearchOptions) -> "PreTrainedModel":
    from .. import ManticoreForCausalLM
    from .models import load_hybrid

    if options.components is None:
        return load_hybrid(options.model)
    import torch

    model = ManticoreForCausalLM.from_components(options.components, num_blocks=options.num_blocks)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _texts(
    options: SearchOptions, gradient: GradientOptions, tokenizer: "PreTrainedTokenizerBase"
) -> "tuple[torch.LongTensor, torch.LongTensor]":
    """Shuffled rows to fit bridges and to train on, and rows to score on, disjoint, each (rows, row_length)."""
    import torch

    from .models import rows_of

    count = options.rows or DEFAULT_ROWS
    if options.rows is None and options.strategy in GRADIENT:
        count = max(count, gradient.steps * options.batch_size)
    wanted = count if options.score_texts else count + -(-count // 3)
    rows = rows_of(options.texts, tokenizer, options.row_length, wanted, options.cache_folder)
    shuffled = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    if options.score_texts:
        scored = rows_of(
            options.score_texts, tokenizer, options.row_length, options.rows or DEFAULT_ROWS, options.cache_folder
        )
        return shuffled, scored
    require(len(rows) >= 8, f"texts: got {len(rows)} rows of {options.row_length} tokens, allowed is at least 8.")
    held_out = len(rows) // 4
    return shuffled[held_out:], shuffled[:held_out]
