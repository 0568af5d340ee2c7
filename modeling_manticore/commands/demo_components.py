"""What the demo starts from: texts, one tokenizer, and two components, trained once and kept in the cache folder."""

import json
import os
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    Mamba2Config,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    set_seed,
)

from ..tasks.text import cache_folder, corpus, fingerprint, pack, shorten, split, train_tokenizer
from .demo_jobs import Job, run_jobs, save_rows
from .models import load_tokenizer


RECIPE_VERSION = 1  # raised when the same settings would give other components


@dataclass
class Domain:
    """Rows of one kind of text, (rows, length) each, in three disjoint splits."""

    name: str
    train: torch.LongTensor
    search: torch.LongTensor
    test: torch.LongTensor


@dataclass
class Component:
    """A component: its label in the table, where it is, and the seconds its training took (None: not trained here)."""

    name: str
    folder: str
    seconds: float | None


def read_splits(options) -> list:
    """One `Splits` of documents for every text of the options."""
    documents = [corpus(name, options.cache_folder) for name in options.texts]
    return [split(shorten(d, options.max_characters, options.seed), seed=options.seed) for d in documents]


def pack_domains(splits: list, tokenizer: PreTrainedTokenizerBase, options) -> list[Domain]:
    """Rows of all domains under one tokenizer."""
    length = options.row_length
    return [
        Domain(name, *(pack(tokenizer, getattr(parts, part), length) for part in ("train", "search", "test")))
        for name, parts in zip(options.domains, splits)
    ]


def own_components(options, splits: list) -> tuple[list[Component], PreTrainedTokenizerBase]:
    """
    The demo's own components: a GPT-NeoX on the first text and a Mamba-2 on the second, with one tokenizer of both.
    Trained side by side, one thread each, unless the cache folder has them for these settings and texts.
    """
    shape = (options.hidden_size, options.num_layers, options.vocab_size, options.row_length)
    budget = (options.component_steps, options.batch_size, options.component_learning_rate, options.seed)
    key = fingerprint(RECIPE_VERSION, shape, budget, [parts.train for parts in splits])
    folder = cache_folder(options.cache_folder) / "demo" / key
    configs = _configurations(options)
    names = [f"{domain}_{config.model_type}" for domain, config in zip(options.domains, configs)]
    if options.retrain or not folder.is_dir():
        _train_into(folder, names, configs, splits, options)
    else:
        print(f"components: cached in {folder}")
    seconds = json.loads((folder / "seconds.json").read_text())
    labels = [f"{config.model_type} ({domain})" for domain, config in zip(options.domains, configs)]
    components = [Component(label, str(folder / name), seconds[name]) for label, name in zip(labels, names)]
    return components, load_tokenizer(str(folder / names[0]))


def given_components(options) -> tuple[list[Component], PreTrainedTokenizerBase]:
    """The user's components, and the tokenizer of the first."""
    components = [Component(Path(name).name, name, None) for name in options.components]
    return components, load_tokenizer(options.components[0])


def _train_into(folder: Path, names: list[str], configs: list[PreTrainedConfig], splits: list, options) -> None:
    """Train all components in a temporary sibling of `folder`, then move it into place."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    tokenizer = train_tokenizer([text for parts in splits for text in parts.train], options.vocab_size)
    print(f"tokenizer: {len(tokenizer)} entries in {time.perf_counter() - start:.0f} s")
    domains = pack_domains(splits, tokenizer, options)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".training-") as temporary:
        work, done = Path(temporary, "work"), Path(temporary, "done")
        jobs = []
        for name, config, domain in zip(names, configs, domains):
            config.vocab_size = len(tokenizer)
            config.bos_token_id = config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
            set_seed(options.seed)
            AutoModelForCausalLM.from_config(config).save_pretrained(work / name / "start")
            jobs.append(
                Job(
                    name=f"train {name}",
                    model=str(work / name / "start"),
                    output=str(work / name / "trained"),
                    rows=save_rows(domain.train, work / f"{domain.name}.safetensors"),
                    steps=options.component_steps,
                    batch_size=options.batch_size,
                    learning_rate=options.component_learning_rate,
                    seed=options.seed,
                )
            )
        run_jobs(jobs, options.workers)
        for name, job in zip(names, jobs):
            trained = Path(job.output)
            kept = [f for f in trained.iterdir() if f.suffix == ".safetensors" or f.name.endswith("config.json")]
            (done / name).mkdir(parents=True)
            for file in kept:
                os.replace(file, done / name / file.name)
            tokenizer.save_pretrained(done / name)
        seconds = {name: job.result()["seconds"] for name, job in zip(names, jobs)}
        (done / "seconds.json").write_text(json.dumps(seconds, indent=2) + "\n")
        if folder.is_dir():
            shutil.rmtree(folder)
        os.replace(done, folder)


def _configurations(options) -> list[PreTrainedConfig]:
    width, depth = options.hidden_size, options.num_layers
    head = 32 if width % 32 == 0 else width // 2
    neox = GPTNeoXConfig(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=width // head,
        intermediate_size=4 * width,
        max_position_embeddings=max(1024, options.row_length),
        tie_word_embeddings=False,
    )
    mamba = Mamba2Config(
        hidden_size=width,
        num_hidden_layers=depth,
        expand=2,
        head_dim=head,
        num_heads=2 * width // head,
        n_groups=1,
        state_size=32,
        chunk_size=32,
        tie_word_embeddings=False,
    )
    return [neox, mamba]
