"""`manticore train`: train a hybrid in a folder, with every option of transformers' TrainingArguments."""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from .parsing import TEXT_CACHE, Interrupted, parse_options, require, require_positive
from .search_training import check_search_texts, search_rows, suit


@dataclass
class TrainOptions:
    model: str = field(metadata={"help": "Folder or repository of the hybrid."})
    train_texts: list[str] = field(
        metadata={"help": "bible, python, topics, or .txt/.jsonl files and folders; rows of all are shuffled."}
    )
    eval_texts: list[str] | None = field(
        default=None, metadata={"help": "Texts to measure on; without them a tenth of the training rows is held out."}
    )
    search_texts: list[str] | None = field(
        default=None,
        metadata={
            "help": "Texts that mixture weights learn on, for strategy darts and gaea on darts; without them a third "
            "of the training rows is held out for that. No text may be in two of the three."
        },
    )
    rows: int | None = field(default=None, metadata={"help": "At most so many rows of each training text."})
    row_length: int = field(default=128, metadata={"help": "Tokens per row."})
    cache_folder: str | None = field(default=None, metadata={"help": TEXT_CACHE})
    teacher: list[str] | None = field(
        default=None,
        metadata={
            "help": "Who teaches in stage distill: a model's folder or repository, the number of a component, "
            "'components' (all, as an ensemble), or the folder of a teacher cache; several are an ensemble."
        },
    )


def kinds() -> tuple[type, ...]:
    """Classes of the options; the Trainer's takes a while to import."""
    from .. import ManticoreTrainingArguments

    return TrainOptions, ManticoreTrainingArguments


def run(arguments: list[str]) -> None:
    """
    Raises:
        ValueError: bad options, model or texts.
    """
    from .. import ManticoreTrainer

    options, training = parse_options(kinds(), arguments, "train")
    require_positive(options, "rows", "row_length")
    require(bool(options.train_texts), "train_texts: got nothing, allowed is at least one text.")
    needs_search = check_search_texts(training, options.search_texts)

    import torch

    training.disable_tqdm = training.disable_tqdm or not sys.stderr.isatty()

    from ..search.callbacks import plain_without_terminal
    from ..tasks.text import as_dataset
    from .models import check_output, load_hybrid, load_tokenizer, rows_of

    folder = check_output(training.output_dir)
    model = load_hybrid(options.model)
    tokenizer = load_tokenizer(options.model, field="model")
    parts = [
        rows_of([name], tokenizer, options.row_length, options.rows, options.cache_folder)
        for name in options.train_texts
    ]
    rows = torch.cat(parts)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(training.seed))]
    if options.eval_texts:
        held_out = rows_of(options.eval_texts, tokenizer, options.row_length, 256, options.cache_folder)
    else:
        require(len(rows) >= 10, f"train_texts: got {len(rows)} rows of {options.row_length} tokens, allowed is 10.")
        held_out, rows = rows[: len(rows) // 10], rows[len(rows) // 10 :]
    searched = None
    if needs_search:
        rows, searched = search_rows(rows, options.search_texts, tokenizer, options.rows, options.cache_folder)
    if training.stage == "search":
        suit(model, training.strategy)
    trainer = ManticoreTrainer(
        model=model,
        args=training,
        train_dataset=as_dataset(rows),
        eval_dataset=as_dataset(held_out),
        search_dataset=None if searched is None else as_dataset(searched),
        processing_class=tokenizer,
        teacher=teacher_of(options.teacher),
    )
    plain_without_terminal(trainer, training.stage)
    try:
        trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    except KeyboardInterrupt as stop:
        raise Interrupted(how_to_resume(folder)) from stop
    metrics = trainer.evaluate()
    trainer.save_model(str(folder))
    trainer.save_metrics("eval", metrics)
    print(f"held-out loss {metrics['eval_loss']:.3f}; the hybrid is in {folder}")


def how_to_resume(folder: Path) -> str:
    """What to do after Ctrl-C in a training that writes its checkpoints there."""
    from transformers.trainer_utils import get_last_checkpoint

    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if last is None:
        return "There is no checkpoint yet; the same command starts again (see --save_steps)."
    return f"Add --resume_from_checkpoint {last} to the same command to go on from there."


def teacher_of(names: list[str] | None) -> str | int | list | None:
    """The Trainer's `teacher` of names, of which numbers are components of the hybrid; several are an ensemble."""
    if not names:
        return None
    named = [int(name) if name.isdigit() and not Path(name).is_dir() else name for name in names]
    return named[0] if len(named) == 1 else named
