"""Searches by gradient from the command line: train the supernet's mixture, then discretize it under the limits."""

import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from .parsing import require


if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from .. import Budget, ManticoreTrainer, ManticoreTrainingArguments
    from ..building.costs import CostTable
    from ..search.search_report import SearchReport


CALIBRATION_ROWS = 256  # at most, of the training rows, for the bridges
EVALUATIONS, LOGS = 4, 20  # over a whole search


@dataclass
class GradientOptions:
    """Of the strategies joint, gaea, dash and darts. What more there is, `manticore train` has."""

    _argument_group_name: ClassVar[str] = "gradient strategies (joint, gaea, dash, darts)"

    steps: int = field(default=200, metadata={"help": "Optimizer steps of batch_size rows."})
    learning_rate: float = field(default=1e-4, metadata={"help": "Learning rate of components and projectors."})
    mixture_learning_rate: float | None = field(
        default=None, metadata={"help": "Learning rate of mixture weights (default: 0.1)."}
    )
    train_components: bool = field(default=True, metadata={"help": "Whether the components train too."})
    search_texts: list[str] | None = field(
        default=None,
        metadata={
            "help": "darts, and gaea on darts: texts that mixture weights learn on; without them a third of the "
            "training rows."
        },
    )
    gaea_base: str = field(default="joint", metadata={"help": "gaea: joint or darts."})
    temperature_start: float = field(default=1.0, metadata={"help": "dash: temperature at the first step."})
    temperature_end: float = field(default=0.1, metadata={"help": "dash: temperature at the last step."})
    cost_weight: float = field(
        default=0.0, metadata={"help": "Nats per token that the expected cost of cost_kind adds to the loss."}
    )
    cost_kind: str = field(
        default="parameters",
        metadata={
            "help": "Cost that cost_weight weighs: attention_blocks, parameters, cache_bytes_per_token or "
            "flops_per_token."
        },
    )
    seed: int = field(default=0, metadata={"help": "Seed of order, noise and dropout."})


def arguments_of(
    strategy: str, options: GradientOptions, output: str | Path, batch_size: int
) -> "ManticoreTrainingArguments":
    """
    The Trainer's arguments: `options` under their own names, and quiet, without checkpoints.

    Raises:
        ValueError: an option that they refuse.
    """
    from .. import ManticoreTrainingArguments

    own = {f.name: getattr(options, f.name) for f in fields(options) if f.name not in ("steps", "search_texts")}
    return ManticoreTrainingArguments(
        output_dir=str(output),
        stage="search",
        strategy=strategy,
        max_steps=options.steps,
        per_device_train_batch_size=batch_size,
        per_device_eval_batch_size=batch_size,
        eval_strategy="steps",
        eval_steps=max(1, options.steps // EVALUATIONS),
        logging_steps=max(1, options.steps // LOGS),
        save_strategy="no",
        report_to="none",
        disable_tqdm=not sys.stderr.isatty(),
        **own,
    )


def check_search_texts(args: "ManticoreTrainingArguments", texts: list[str] | None) -> bool:
    """
    Whether these arguments want a search split.

    Raises:
        ValueError: there are texts for one, and they do not.
    """
    from ..search import make_strategy

    needed = args.stage == "search" and make_strategy(args).uses_search_data()
    what = f"strategy={args.strategy!r}" if args.stage == "search" else f"stage={args.stage!r}"
    require(
        needed or not texts,
        f"search_texts: got {texts} with {what}, which does not use them; allowed is stage 'search' with strategy "
        "'darts', or 'gaea' with gaea_base 'darts'.",
    )
    return needed


def search_rows(
    rows: "torch.LongTensor",
    texts: list[str] | None,
    tokenizer: "PreTrainedTokenizerBase",
    limit: int | None,
    cache: str | None,
) -> "tuple[torch.LongTensor, torch.LongTensor]":
    """
    Training rows and rows of the search split: of `texts`, as many at most; without texts a third of the training
    rows, which a printed line says.

    Args:
        rows: training rows (rows, length), shuffled.
        limit: at most so many rows of the texts.

    Raises:
        ValueError: too few rows to divide, or bad texts.
    """
    from .models import rows_of

    length = rows.shape[1]
    if texts:
        return rows, rows_of(texts, tokenizer, length, limit, cache)
    require(len(rows) >= 3, f"texts: got {len(rows)} training rows of {length} tokens, allowed is at least 3.")
    held = len(rows) // 3
    print(f"{held} of {len(rows)} training rows are held out for the mixture weights (no search_texts)")
    return rows[held:], rows[:held]


def suit(model: "PreTrainedModel", strategy: str) -> None:
    """Give the mixtures a parametrisation that the strategy can step; a printed line says so."""
    from ..search import suit_mixture

    before = model.config.mixture
    if suit_mixture(model, strategy):
        print(f"mixture weights are parametrised as {model.config.mixture!r} for {strategy} (they were {before!r})")


def train_search(
    model: "PreTrainedModel",
    args: "ManticoreTrainingArguments",
    rows: "torch.LongTensor",
    held_out: "torch.LongTensor",
    search: "torch.LongTensor | None",
    budget: "Budget | None",
) -> "tuple[list[int], CostTable, ManticoreTrainer]":
    """
    Search the supernet by gradient, and choose the paths of the largest product of mixture weights within the budget.

    Args:
        model: the supernet; it is trained in place.
        rows, held_out, search: rows (rows, length) for the weights, for the losses that are told, and for the mixture
            where the strategy wants its own.

    Returns:
        The choice, one path index a block, the costs of all choices, and the Trainer with its report.

    Raises:
        ValueError: limits that no choice meets, or splits that are not disjoint, before anything trains.
    """
    from .. import Budget, ManticoreTrainer
    from ..building.discretize import usable_paths
    from ..building.limits import argmax_under
    from ..search.callbacks import plain_without_terminal
    from ..tasks.text import as_dataset

    trainer = ManticoreTrainer(
        model=model,
        args=args,
        train_dataset=as_dataset(rows),
        eval_dataset=as_dataset(held_out),
        search_dataset=None if search is None else as_dataset(search),
        budget=budget,
    )
    plain_without_terminal(trainer, args.strategy)
    alone = losses_alone(model, held_out, args.per_device_eval_batch_size)
    trainer.train()
    trainer.search_report.alone = alone
    table = trainer.cost_table()
    choice = argmax_under(table, model.mixture_weights(), budget or Budget(), usable_paths(model))
    return choice, table, trainer


def losses_alone(model: "PreTrainedModel", held_out: "torch.LongTensor", batch_size: int) -> dict[str, float]:
    """Component -> its own loss (nats) on rows (rows, length), of those that a supernet holds whole."""
    from ..building.discretize import component_alone
    from ..search.history import component_names
    from .models import measure

    losses = {}
    for k, name in enumerate(component_names(model.config)):
        component = component_alone(model, k)
        if component is not None:
            losses[name] = measure(component, held_out, batch_size, label=f"{name} alone, held out")["loss"]
    return losses


def train_and_discretize(
    model: "PreTrainedModel",
    args: "ManticoreTrainingArguments",
    rows: "torch.LongTensor",
    held_out: "torch.LongTensor",
    search: "torch.LongTensor | None",
    budget: "Budget | None",
    order: str | None,
) -> "tuple[PreTrainedModel, SearchReport]":
    """
    `train_search`, then cut out the choice, measure it, and write the report folder of `args.output_dir`
    with all of it.

    Args:
        order: in which the bridges are fitted, as in `discretize`; None: they stay as the search has trained them.

    Raises:
        ValueError: as `train_search`.
    """
    from .. import discretize
    from ..search.callbacks import REPORT_DIR
    from ..search.stitch_report import slices_of
    from .models import measure

    choice, table, trainer = train_search(model, args, rows, held_out, search, budget)
    size = args.per_device_train_batch_size
    fitting = {} if order is None else {"calibration": rows[:CALIBRATION_ROWS], "order": order}
    hybrid = discretize(model, choice, **fitting, batch_size=size, budget=budget)
    report = trainer.search_report
    report.discretized = {
        "choice": choice,
        "slices": slices_of(model.config, choice),
        "order": order,
        "supernet_loss": measure(model, held_out, size, label="supernet, held out")["loss"],
        "loss": measure(hybrid, held_out, size, label="hybrid, held out")["loss"],
        "costs": table.of(choice),
    }
    report.save(Path(args.output_dir, REPORT_DIR), trainer.state.log_history)
    return hybrid, report
