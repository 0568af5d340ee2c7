"""Small trained components, their rows, one way of fine-tuning, and a store that a killed benchmark continues from."""

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    Mamba2Config,
    PreTrainedConfig,
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_manticore import ManticoreTrainer, ManticoreTrainingArguments
from modeling_manticore.commands.models import measure
from modeling_manticore.search.halving import collate
from modeling_manticore.tasks.text import (
    cache_folder,
    corpus,
    fingerprint,
    interleave,
    pack,
    shorten,
    split,
    train_tokenizer,
)


DOMAINS = ("bible", "python")
PARTS = ("train", "search", "test")
TIME_NOTE = "process CPU time (time.process_time) of one thread, because the machine was shared; no wall clock"


@dataclass(frozen=True)
class Shape:
    """Size of the components and of their training. `characters` are read of every domain."""

    width: int = 64
    layers: int = 6
    vocabulary: int = 2048
    length: int = 64
    characters: int = 3_000_000
    component_tokens: int = 400_000
    component_rate: float = 4e-3
    component_rows: int = 16


class Store:
    """
    Finished units of work, one JSON file each, named after a digest of their settings. A killed run repeats at most
    the unit it was in, and runs with other settings can share a folder.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def once(self, kind: str, settings: dict, make: Callable[[], dict]) -> dict:
        """The result of `make`, from the file of these settings where there is one."""
        file = self.folder / kind / f"{fingerprint(json.dumps(settings, sort_keys=True))}.json"
        if file.is_file():
            return json.loads(file.read_text())["result"]
        started = time.process_time()
        result = make()
        file.parent.mkdir(parents=True, exist_ok=True)
        staged = file.with_name(f".{file.name}")
        content = {"settings": settings, "unit_seconds": time.process_time() - started, "result": result}
        staged.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(staged, file)
        told = {key: value for key, value in settings.items() if key not in ("shape", "data")}
        short = {key: value for key, value in result.items() if not isinstance(value, (list, dict))}
        print(f"{content['unit_seconds']:6.1f} s  {kind}  {told}  {short}", flush=True)
        return result

    def folder_once(self, kind: str, settings: dict, make: Callable[[Path], None]) -> Path:
        """A folder that `make` fills, from these settings where there is one."""
        folder = self.folder / kind / fingerprint(json.dumps(settings, sort_keys=True))
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".unfinished-") as staged:
                made = Path(staged) / "made"
                made.mkdir()
                make(made)
                (made / "settings.json").write_text(json.dumps(settings, indent=1) + "\n")
                os.replace(made, folder)
        return folder


class Workshop:
    """
    Texts, tokenizer and components of one shape, made when they are first asked for. The three splits are the same for
    all seeds; a seed is another initialisation and another order of a component's rows.
    """

    def __init__(self, shape: Shape, store: Store):
        self.shape, self.store = shape, store
        settings = {key: getattr(shape, key) for key in ("vocabulary", "length", "characters")}
        self.texts = store.folder_once("texts", settings, self._make_texts)
        self.rows = {domain: load_file(self.texts / f"{domain}.safetensors") for domain in DOMAINS}

    def _make_texts(self, folder: Path) -> None:
        splits = {name: split(shorten(corpus(name), self.shape.characters)) for name in DOMAINS}
        tokenizer = train_tokenizer([text for parts in splits.values() for text in parts.train], self.shape.vocabulary)
        tokenizer.save_pretrained(folder)
        for name, parts in splits.items():
            rows = {part: pack(tokenizer, getattr(parts, part), self.shape.length) for part in PARTS}
            save_file(rows, folder / f"{name}.safetensors")

    def mixed(self, part: str, count: int, seed: int = 0) -> torch.LongTensor:
        """(count, length) rows of one split, half of every domain, in an order of the seed."""
        return interleave([self.rows[domain][part] for domain in DOMAINS], count, seed)

    def component(self, family: str, domain: str, seed: int) -> Path:
        """The folder of a trained component."""
        settings = {"shape": asdict(self.shape), "family": family, "domain": domain, "seed": seed}
        return self.store.folder_once("components", settings, lambda folder: self._train(folder, family, domain, seed))

    def components(self, pair: list[tuple[str, str]], seed: int) -> list[str]:
        """Folders of the components of a pair, (family, domain) each."""
        return [str(self.component(family, domain, seed)) for family, domain in pair]

    def _train(self, folder: Path, family: str, domain: str, seed: int) -> None:
        shape = self.shape
        tokenizer = AutoTokenizer.from_pretrained(self.texts)
        config = configuration(family, shape)
        config.bos_token_id = config.eos_token_id = config.pad_token_id = tokenizer.eos_token_id
        set_seed(1000 + seed)
        model = AutoModelForCausalLM.from_config(config)
        started = time.process_time()
        steps = round(shape.component_tokens / (shape.component_rows * shape.length))
        train(
            model,
            self.rows[domain]["train"],
            steps=steps,
            rows_per_step=shape.component_rows,
            learning_rate=shape.component_rate,
            seed=1000 + seed,
            schedule="cosine",
        )
        seconds = time.process_time() - started
        losses = {name: measure(model, self.rows[name]["test"][:128])["loss"] for name in DOMAINS}
        print(f"{seconds:6.1f} s  component  {family}({domain}) seed {seed}  {losses}", flush=True)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        (folder / "trained.json").write_text(json.dumps({"seconds": seconds, "losses": losses}) + "\n")


def configuration(family: str, shape: Shape) -> PreTrainedConfig:
    """A configuration of a family with the sizes of the shape."""
    width, layers, vocabulary = shape.width, shape.layers, shape.vocabulary
    sizes = {"vocab_size": vocabulary, "hidden_size": width, "num_hidden_layers": layers, "tie_word_embeddings": False}
    heads = {"num_attention_heads": width // 32, "max_position_embeddings": 512}
    if family == "gpt_neox":
        return GPTNeoXConfig(**sizes, **heads, intermediate_size=4 * width)
    if family == "llama":
        return LlamaConfig(**sizes, **heads, intermediate_size=8 * width // 3)
    if family == "gpt2":
        dropouts = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
        return GPT2Config(
            vocab_size=vocabulary,
            n_embd=width,
            n_layer=layers,
            n_head=width // 32,
            n_positions=512,
            tie_word_embeddings=False,
            **dropouts,
        )
    if family == "mamba2":
        return Mamba2Config(
            **sizes, expand=2, head_dim=32, num_heads=width // 16, n_groups=1, state_size=32, chunk_size=32
        )
    raise ValueError(f"family: got {family!r}, allowed are gpt_neox, llama, gpt2, mamba2.")


def train(
    model: PreTrainedModel,
    rows: torch.LongTensor,
    *,
    steps: int,
    rows_per_step: int,
    learning_rate: float,
    seed: int,
    schedule: str = "linear",
    warmup: float = 0.1,
    callbacks: list | None = None,
    search_rows: torch.LongTensor | None = None,
    **options,
) -> PreTrainedModel:
    """
    Train in place on rows (rows, length), in an order of the seed: AdamW as transformers has it, no weight decay,
    gradients clipped at 1. It is what `stitch` does in its rungs. `options` go to ManticoreTrainingArguments.
    """
    hybrid = model.config.model_type == "manticore"
    folder = tempfile.mkdtemp(prefix="manticore-benchmark-")
    settings = {
        "output_dir": folder,
        "max_steps": steps,
        "per_device_train_batch_size": rows_per_step,
        "learning_rate": learning_rate,
        "lr_scheduler_type": schedule,
        "warmup_steps": round(warmup * steps),
        "seed": seed,
        "use_cpu": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    given = {"train_dataset": examples(rows), "data_collator": collate, "callbacks": callbacks}
    if search_rows is not None:
        given["search_dataset"] = examples(search_rows)
    try:
        if hybrid:
            trainer = ManticoreTrainer(model, ManticoreTrainingArguments(**settings, **options), **given)
        else:
            trainer = Trainer(model, TrainingArguments(**settings), **given)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return model.eval()


def examples(rows: torch.LongTensor) -> list[dict]:
    """Rows as the collator of `stitch` takes them."""
    return [{"input_ids": row} for row in rows]


def loss_of(model: PreTrainedModel, rows: torch.LongTensor) -> float:
    """Mean next-token loss in nats."""
    return measure(model, rows)["loss"]


def work_folder(given: str | None, name: str) -> Path:
    """The folder of finished units: the one given, else `benchmarks/NAME` in the package's cache folder."""
    folder = cache_folder() / "benchmarks" / name if given is None else Path(given)
    folder.mkdir(parents=True, exist_ok=True)
    return folder
