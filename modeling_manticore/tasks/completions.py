"""
The paper's completion mixture: text that every component writes itself, in equal parts. It is text of the kind that
each component knows best, when its own training data are not at hand.
"""

from collections.abc import Sequence
from itertools import cycle, islice
from typing import TYPE_CHECKING

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .mad.settings import require_integer


if TYPE_CHECKING:
    from datasets import DatasetDict

# So many batches without a new text: the component ends every text at once, or repeats itself.
SILENT_BATCHES = 10

Component = PreTrainedModel | str


def completion_mixture(
    components: Sequence[Component],
    prompts: Sequence[str],
    tokenizers: Sequence[PreTrainedTokenizerBase] | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    train_rows: int = 256,
    validation_rows: int = 32,
    test_rows: int = 32,
    length: int = 128,
    new_tokens: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    **sampling,
) -> "DatasetDict":
    """
    Text written by every component, packed to rows and mixed, as train, validation and test with the columns
    input_ids, attention_mask, labels and component (its place in `components`). Every component has the same number
    of rows, so of tokens, in each split. `calibrate`, the search and the Trainer take it as it is. No text is in two
    splits.

    Args:
        components: models, or folders or repositories, which are loaded one at a time.
        prompts: beginnings that every component goes on from, over and over; they are not part of the rows.
        tokenizers: of the components; by default loaded from the same folders and repositories.
        tokenizer: that of the rows; by default the first component's.
        train_rows, validation_rows, test_rows: in all, multiples of the number of components.
        length: tokens of a row.
        new_tokens, batch_size, seed, sampling: see `write_completions`.

    Raises:
        ValueError: no components or prompts, models without tokenizers, sizes that are no such numbers, or a component
            that writes nothing new.
    """
    counts = {"test": test_rows, "validation": validation_rows, "train": train_rows}
    if isinstance(components, (str, PreTrainedModel)) or not components:
        raise ValueError(f"components: got {components!r:.60}, allowed is a list of at least one model.")
    for name, count in counts.items():
        require_integer(f"{name}_rows", count, len(components))
        if count % len(components):
            raise ValueError(f"{name}_rows: got {count}, allowed are multiples of {len(components)}, one a component.")
    require_integer("length", length, 2)
    _check(prompts, new_tokens, batch_size, seed)
    tokenizers = _tokenizers(components, tokenizers)
    tokenizer = tokenizers[0] if tokenizer is None else tokenizer
    rows: dict[str, list[tuple[int, list[int]]]] = {name: [] for name in counts}
    for place, component in enumerate(components):
        model = _loaded(component) if isinstance(component, str) else component
        texts = _texts(model, tokenizers[place], prompts, new_tokens, batch_size, seed + place, sampling)
        for name, count in counts.items():
            rows[name] += [(place, row) for row in _rows(texts, tokenizer, count // len(components), length)]
    return _mixed(rows, seed)


def write_completions(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    count: int,
    *,
    new_tokens: int = 128,
    batch_size: int = 16,
    seed: int = 0,
    **sampling,
) -> list[str]:
    """
    So many different texts that a model writes after the prompts, which take turns; without the prompts. The global
    random state is left as it was.

    Args:
        new_tokens: of a text, at most.
        seed: the same seed, batch size and machine give the same texts.
        sampling: of `generate`: temperature, top_k, top_p, ... By default the model's distribution as it is.

    Raises:
        ValueError: no prompts, or sizes that are no such numbers, or a model that writes nothing new.
    """
    require_integer("count", count, 1)
    _check(prompts, new_tokens, batch_size, seed)
    return list(islice(_texts(model, tokenizer, prompts, new_tokens, batch_size, seed, sampling), count))


def _check(prompts: Sequence[str], new_tokens: int, batch_size: int, seed: int) -> None:
    if isinstance(prompts, str) or not prompts or not all(isinstance(p, str) and p for p in prompts):
        raise ValueError(f"prompts: got {prompts!r:.60}, allowed is a list of texts that are not empty.")
    for name, value, smallest in (("new_tokens", new_tokens, 1), ("batch_size", batch_size, 1), ("seed", seed, 0)):
        require_integer(name, value, smallest)


def _tokenizers(
    components: Sequence[Component], tokenizers: Sequence[PreTrainedTokenizerBase] | None
) -> list[PreTrainedTokenizerBase]:
    if tokenizers is not None:
        if len(tokenizers) != len(components):
            raise ValueError(
                f"tokenizers: got {len(tokenizers)} for {len(components)} components, allowed is one each."
            )
        return list(tokenizers)
    for component in components:
        if not isinstance(component, str):
            raise ValueError("tokenizers: got None with models in memory, allowed is a tokenizer for each component.")
    return [AutoTokenizer.from_pretrained(component) for component in components]


def _loaded(component: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(component).to("cuda" if torch.cuda.is_available() else "cpu")


def _texts(model, tokenizer, prompts, new_tokens, batch_size, seed, sampling):
    """Different texts without end, batch by batch, each batch with a seed of its own."""
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0} | sampling
    turn = cycle(prompts)
    number, silent, seen = 0, 0, set()
    while True:
        input_ids, mask, padding = _left_padded(tokenizer, list(islice(turn, batch_size)))
        cuda = [model.device] if model.device.type == "cuda" else []
        was_training = model.training
        model.eval()
        with torch.random.fork_rng(devices=cuda), torch.inference_mode():
            torch.manual_seed((seed << 24) + number)
            written = model.generate(
                input_ids=input_ids.to(model.device),
                attention_mask=mask.to(model.device),
                max_new_tokens=new_tokens,
                pad_token_id=padding,
                **options,
            )
        model.train(was_training)
        texts = tokenizer.batch_decode(written[:, input_ids.shape[1] :], skip_special_tokens=True)
        texts = [text for text in dict.fromkeys(texts) if text.strip() and text not in seen]
        seen.update(texts)
        number, silent = number + 1, 0 if texts else silent + 1
        if silent == SILENT_BATCHES:
            raise ValueError(
                f"components: {model.config.model_type!r} wrote no new text in {silent} batches of prompts, allowed "
                "are models that write; more prompts, new_tokens or another temperature may help."
            )
        yield from texts


def _left_padded(
    tokenizer: PreTrainedTokenizerBase, prompts: list[str]
) -> tuple[torch.LongTensor, torch.LongTensor, int]:
    padding = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)
    rows = tokenizer(prompts, verbose=False)["input_ids"]
    longest = max(map(len, rows))
    input_ids = [[padding] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(input_ids), torch.tensor(mask), padding


def _rows(texts, tokenizer: PreTrainedTokenizerBase, count: int, length: int) -> list[list[int]]:
    """So many rows of the next texts, each ended by the end-of-text token; what is left of the last is dropped."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids: list[int] = []
    while len(ids) < count * length:
        ids += tokenizer(next(texts), add_special_tokens=False, verbose=False)["input_ids"] + end
    return [ids[begin : begin + length] for begin in range(0, count * length, length)]


def _mixed(rows: dict[str, list[tuple[int, list[int]]]], seed: int) -> "DatasetDict":
    from datasets import Dataset, DatasetDict

    made = DatasetDict()
    for name in ("train", "validation", "test"):
        order = torch.randperm(len(rows[name]), generator=torch.Generator().manual_seed(seed)).tolist()
        places, ids = zip(*(rows[name][i] for i in order))
        masks = [[1] * len(row) for row in ids]
        columns = {"input_ids": ids, "attention_mask": masks, "labels": ids, "component": places}
        made[name] = Dataset.from_dict(columns)
    return made
