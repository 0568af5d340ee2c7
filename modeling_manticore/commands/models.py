"""What several sub-commands do with models and rows: load, read texts, measure."""

import math
import statistics
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from ..building.sources import DESCRIPTION_FILES, WEIGHT_FILES, fetched
from ..progress import progress_bar
from ..tasks.text import corpus, pack
from .parsing import require


def load_model(name: str, trust_remote_code: bool = False, revision: str | None = None) -> PreTrainedModel:
    """
    A causal language model of a folder or repository, on the best device there is, in evaluation mode.

    Raises:
        ValueError: there is none.
    """
    if Path(name).is_dir():
        require((Path(name) / "config.json").is_file(), f"model: got the folder {name!r}, which has no config.json.")
    options = {"trust_remote_code": trust_remote_code} | ({} if revision is None else {"revision": revision})
    options = fetched(f"model ({name})", name, options, DESCRIPTION_FILES + WEIGHT_FILES)
    try:
        model = AutoModelForCausalLM.from_pretrained(name, **options)
    except OSError as error:
        raise ValueError(f"model: {name!r} cannot be loaded ({str(error).splitlines()[0]})") from error
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def load_hybrid(name: str) -> PreTrainedModel:
    """
    As `load_model`, and it must be a hybrid.

    Raises:
        ValueError: it is something else.
    """
    model = load_model(name)
    require(
        model.config.model_type == "manticore",
        f"model: got {name!r} of type {model.config.model_type!r}, allowed is a hybrid made by `manticore compose`.",
    )
    return model


def load_tokenizer(name: str, revision: str | None = None, field: str = "tokenizer") -> PreTrainedTokenizerBase:
    """
    The tokenizer of a folder or repository, which the user named in a field.

    Raises:
        ValueError: there is none.
    """
    options = {"trust_remote_code": False} | ({} if revision is None else {"revision": revision})
    options = fetched(f"{field} ({name})", name, options, DESCRIPTION_FILES)
    try:
        return AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer: {name!r} has none ({str(error).splitlines()[0]})") from error


def rows_of(
    texts: list[str],
    tokenizer: PreTrainedTokenizerBase,
    length: int,
    limit: int | None = None,
    cache: str | None = None,
) -> torch.LongTensor:
    """Rows of ids (rows, length) of corpora and files; at most `limit`, evenly spread over the whole."""
    rows = pack(tokenizer, [document for name in texts for document in corpus(name, cache)], length)
    if limit is None or len(rows) <= limit:
        return rows
    return rows[torch.linspace(0, len(rows) - 1, limit).round().long()]


@torch.inference_mode()
def measure(model: PreTrainedModel, rows: torch.LongTensor, batch_size: int = 16, label: str | None = None) -> dict:
    """
    Mean next-token loss in nats, its standard error over rows (None for one row), perplexity and accuracy over rows of
    ids (rows, length).

    Args:
        label: shows a progress bar of that name.
    """
    was_training = model.training
    model.eval()
    losses, hits, count = [], 0, 0
    for batch in progress_bar(rows.split(batch_size), desc=label, unit="batch", show=label is not None, leave=False):
        batch = batch.to(model.device)
        logits = model(input_ids=batch, use_cache=False).logits[:, :-1].float()
        targets = batch[:, 1:]
        entries = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        losses += entries.view_as(targets).double().mean(dim=1).tolist()
        hits += (logits.argmax(-1) == targets).sum().item()
        count += targets.numel()
    model.train(was_training)
    mean = statistics.fmean(losses)
    return {
        "loss": mean,
        "standard_error": statistics.stdev(losses) / math.sqrt(len(losses)) if len(losses) > 1 else None,
        "perplexity": math.exp(min(mean, 700.0)),
        "accuracy": hits / count,
        "tokens": count,
    }


def check_output(folder: str) -> Path:
    """
    Raises:
        ValueError: the output folder is a file.
    """
    path = Path(folder)
    require(not path.is_file(), f"output_folder: got the file {folder!r}, allowed is a folder.")
    return path
