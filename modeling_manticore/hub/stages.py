"""The stages of a build: what each takes from its recipe, when it is left out, and how it runs."""

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed

from .. import Budget, HalvingOptions, ManticoreForCausalLM, ManticoreTrainer, ManticoreTrainingArguments
from .. import calibrate as fit_projectors
from .. import discretize as keep_paths
from .. import stitch as score_hybrids
from ..commands.models import load_hybrid, load_model, load_tokenizer, measure, rows_of
from ..commands.search_training import (
    GradientOptions,
    arguments_of,
    check_search_texts,
    search_rows,
    suit,
    train_search,
)
from ..commands.train import teacher_of
from ..search.callbacks import REPORT_DIR, plain_without_terminal
from ..tasks.text import as_dataset, corpus, train_tokenizer
from .plan import architecture, recipe_configuration
from .recipe_schema import GRADIENT_STRATEGIES, Recipe, SearchRecipe
from .recipes import recipe_to_dict


MODEL, CHOICE, RESULTS, CARD = "model", "choice.json", "results.json", "README.md"
COMPOSING = ("components", "num_blocks", "blocks", "skip_paths", "tokenizer_from", "tokenizer", "gate", "mixture")
COMPOSING += ("head_mixture", "project_ends", "projector_init", "hidden_size", "dtype", "seed")


@dataclass
class Work:
    """A build on its way: where it writes, commits and licences of its components, and which stages are finished."""

    recipe: Recipe
    folder: Path
    cache_folder: str | None
    revisions: list[str | None]
    licenses: list[str | None]
    done: list[str] = field(default_factory=list)

    def finished(self, name: str) -> None:
        """A stage's folder is there and valid."""
        self.done.append(name)

    def latest(self, file: str) -> Path:
        """The file or folder of this name that the last finished stage left, of those that leave one."""
        found = [place for name in self.done if (place := self.folder / name / file).exists()]
        if not found:
            raise ValueError(f"{self.folder}: no finished stage left {file}.")
        return found[-1]

    @property
    def model_folder(self) -> Path:
        """The hybrid or supernet as it is so far."""
        return self.latest(MODEL)

    def load(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """The same, loaded, and its tokenizer."""
        return load_hybrid(str(self.model_folder)), load_tokenizer(str(self.model_folder))

    def rows(self, names: list[str], tokenizer: PreTrainedTokenizerBase, length: int, limit: int | None) -> Any:
        """Shuffled rows of ids (rows, length) of texts, at most `limit`, spread evenly over them."""
        rows = rows_of(names, tokenizer, length, limit, self.cache_folder)
        return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.recipe.seed))]


def compose(work: Work, folder: Path) -> None:
    """Components into a supernet or hybrid with fresh projectors."""
    recipe = work.recipe
    if recipe.from_scratch:
        model, tokenizer = _from_scratch(work)
    else:
        names = [component.name for component in recipe.components]
        options = architecture(recipe) | {"dtype": recipe.dtype, "revision": _revisions(work)}
        options["trust_remote_code"] = [component.trust_remote_code for component in recipe.components]
        if recipe.num_blocks is not None:
            options |= {"num_blocks": recipe.num_blocks, "skip_paths": recipe.skip_paths}
        else:
            options["blocks"] = recipe.blocks
        set_seed(recipe.seed)
        model = ManticoreForCausalLM.from_components(names, **options)
        revision = _revisions(work)[recipe.tokenizer_from]
        tokenizer = load_tokenizer(names[recipe.tokenizer_from], revision)
    _save(model, tokenizer, folder)


def calibrate(work: Work, folder: Path) -> None:
    """Projectors and bridges in closed form."""
    section = work.recipe.calibration
    model, tokenizer = work.load()
    rows = work.rows(section.texts, tokenizer, section.row_length, section.rows)
    report = fit_projectors(model, rows, batch_size=section.batch_size, order=section.order)
    print(report)
    (folder / "report.txt").write_text(f"{report}\n", encoding="utf-8")
    _save(model, tokenizer, folder)


def search(work: Work, folder: Path) -> None:
    """The path of every block; gradient strategies also train the supernet."""
    section = work.recipe.search
    if section.strategy == "none":
        _write(folder / CHOICE, {"choice": section.choice})
        return
    model, tokenizer = work.load()
    budget = None if section.limits is None else Budget(**vars(section.limits))
    wanted = section.rows or (section.steps * section.batch_size if section.strategy in GRADIENT_STRATEGIES else 256)
    wanted = max(wanted, 8)
    rows = work.rows(section.texts, tokenizer, section.row_length, wanted if section.score_texts else wanted * 4 // 3)
    if section.score_texts:
        scored = work.rows(section.score_texts, tokenizer, section.row_length, section.rows or 256)
    else:
        if len(rows) < 8:
            raise ValueError(f"search.texts: got {len(rows)} rows of {section.row_length} tokens, allowed is 8.")
        scored, rows = rows[: len(rows) // 4], rows[len(rows) // 4 :]
    if section.strategy == "stitch":
        choice = _stitch(section, model, rows, scored, budget, folder)
    else:
        choice = _by_gradient(work, model, tokenizer, rows, scored, budget, folder)
        _save(model, tokenizer, folder)
    print(f"choice: {choice}")
    _write(folder / CHOICE, {"choice": choice})


def _stitch(section: SearchRecipe, model: Any, rows: Any, scored: Any, budget: Any, folder: Path) -> list[int]:
    halving: HalvingOptions | bool = False
    if section.halving_tokens is not None:
        halving = HalvingOptions(section.halving_tokens, learning_rate=section.halving_learning_rate)
    report = score_hybrids(
        model,
        rows,
        scored,
        limit=section.limit,
        beam=section.beam,
        order=section.order or "parallel",
        budget=budget,
        halving=halving,
        folder=folder / REPORT_DIR,
        batch_size=section.batch_size,
    )
    print(report)
    return list(report.best.choice)


def _by_gradient(work: Work, model: Any, tokenizer: Any, rows: Any, scored: Any, budget: Any, folder: Path) -> list:
    section = work.recipe.search
    names = ("steps", "learning_rate", "mixture_learning_rate", "train_components", "search_texts", "gaea_base")
    names += ("temperature_start", "temperature_end", "cost_weight", "cost_kind", "seed")
    options = GradientOptions(**{name: getattr(section, name) for name in names})
    training = arguments_of(section.strategy, options, folder, section.batch_size)
    searched = None
    if check_search_texts(training, section.search_texts):
        rows, searched = search_rows(rows, section.search_texts, tokenizer, len(rows), work.cache_folder)
    suit(model, section.strategy)
    choice, table, trainer = train_search(model, training, rows, scored, searched, budget)
    report = trainer.search_report
    report.discretized = {"choice": choice, "costs": table.of(choice)}
    report.save(folder / REPORT_DIR, trainer.state.log_history)
    print("\n".join(report.loss_lines()))
    return list(choice)


def discretize(work: Work, folder: Path) -> None:
    """The chosen paths alone, with bridges fitted to the calibration's texts."""
    recipe = work.recipe
    model, tokenizer = work.load()
    choice = json.loads(work.latest(CHOICE).read_text())["choice"]
    section, rows = recipe.calibration, None
    options: dict[str, Any] = {}
    if section is not None:
        rows = work.rows(section.texts, tokenizer, section.row_length, section.rows)
        options = {"order": section.order, "batch_size": section.batch_size}
    limits = recipe.search.limits
    budget = None if limits is None else Budget(**vars(limits))
    hybrid = keep_paths(model, choice, calibration=rows, refit=rows is not None, budget=budget, **options)
    print(hybrid.describe())
    _save(hybrid, tokenizer, folder)


def finetune(work: Work, folder: Path) -> None:
    """Training of everything but mixture weights, with a teacher if the recipe has one."""
    section = work.recipe.finetune
    model, tokenizer = work.load()
    rows = work.rows(section.texts, tokenizer, section.row_length, section.rows)
    names = ("gradient_accumulation_steps", "learning_rate", "weight_decay", "warmup_steps", "lr_scheduler_type")
    names += ("bf16", "gradient_checkpointing", "seed", "distill_weight", "distill_temperature", "hidden_weight")
    given = {name: value for name in names if (value := getattr(section, name)) not in (None, False)}
    training = ManticoreTrainingArguments(
        output_dir=str(folder / "trainer"),
        stage="finetune" if section.teacher is None else "distill",
        max_steps=section.steps,
        per_device_train_batch_size=section.batch_size,
        logging_steps=max(1, section.steps // 20),
        save_strategy="no",
        report_to="none",
        **given,
    )
    trainer = ManticoreTrainer(
        model=model,
        args=training,
        train_dataset=as_dataset(rows),
        processing_class=tokenizer,
        teacher=teacher_of(section.teacher),
    )
    plain_without_terminal(trainer, "finetune")
    trainer.train()
    _write(folder / "log.json", trainer.state.log_history)
    _save(model, tokenizer, folder)


def evaluate(work: Work, folder: Path) -> None:
    """Loss, perplexity, accuracy and bits per byte on the evaluation's texts: the hybrid's, then each component's."""
    section, recipe = work.recipe.evaluation, work.recipe
    found = {"section": asdict(section), "texts": _measured(work, *work.load(), "the hybrid")}
    if section.components and not recipe.from_scratch:
        found["components"] = []
        for component, revision in zip(recipe.components, _revisions(work)):
            model = load_model(component.name, component.trust_remote_code, revision)
            label = component.name if component.folder is None else Path(component.folder).name
            texts = _measured(work, model, load_tokenizer(component.name, revision), label)
            found["components"].append({"name": label, "texts": texts})
            del model
    _write(folder / RESULTS, found)


def _measured(work: Work, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, label: str) -> dict[str, Any]:
    """{text: what `measure` finds, and `bits_per_byte`, in which models of different tokenizers compare}."""
    section, found = work.recipe.evaluation, {}
    for name in section.texts:
        rows = rows_of([name], tokenizer, section.row_length, section.rows, work.cache_folder)
        numbers = measure(model, rows, section.batch_size, label=f"{label} on {name}")
        size = sum(len(text.encode()) for text in tokenizer.batch_decode(rows, skip_special_tokens=True))
        numbers["bits_per_byte"] = numbers["loss"] / math.log(2) * rows.numel() / size if size else None
        told = "" if not size else f", {numbers['bits_per_byte']:.3f} bits per byte"
        print(f"{label} on {name}: loss {numbers['loss']:.3f}, perplexity {numbers['perplexity']:.2f}{told}")
        found[name] = numbers
    return found


def card(work: Work, folder: Path) -> None:
    """The model card, with the recipe and what was measured."""
    write_card = import_module("modeling_manticore.hub.cards").write_card
    results = None
    if work.recipe.evaluation is not None:
        found = json.loads(work.latest(RESULTS).read_text())
        models = [(None, found["texts"])] + [(own["name"], own["texts"]) for own in found.get("components", [])]
        results = [
            {"model": name, "dataset": text, "metric": metric, "value": value}
            | {"over": f"{numbers['tokens']} test tokens"}
            for name, texts in models
            for text, numbers in texts.items()
            for metric, value in numbers.items()
            if metric != "tokens" and value is not None
        ]
    write_card(
        folder,
        work.load()[0],
        repo_id=work.recipe.publishing.repo_id,
        recipe=recipe_to_dict(work.recipe),
        results=results,
        licences=work.licenses,
    )


def push(work: Work, folder: Path) -> None:
    """One commit with the hybrid, its code, tokenizer, recipe, results and card."""
    push_hybrid = import_module("modeling_manticore.hub.push").push_hybrid
    model, tokenizer = work.load()
    publishing, results = work.recipe.publishing, None
    if work.recipe.evaluation is not None:
        results = json.loads(work.latest(RESULTS).read_text())
    commit = push_hybrid(
        model,
        tokenizer,
        publishing.repo_id,
        recipe=recipe_to_dict(work.recipe),
        results=results,
        card=work.latest(CARD),
        private=publishing.private,
        allow_local_sources=publishing.allow_local_sources,
    )
    _write(folder / "commit.json", {"repo_id": publishing.repo_id, "commit": commit.oid, "url": commit.commit_url})
    print(f"pushed to {publishing.repo_id}, revision {commit.oid}")


# ---------------------------------------------------------------------- what runs, and with what
@dataclass(frozen=True)
class Stage:
    """
    One stage.

    Args:
        sections: fields of the recipe that its output depends on, beside what the stage before depends on.
        run: makes the output in an empty folder.
        missing: why a recipe does not have this stage, or None if it has.
    """

    name: str
    sections: tuple[str, ...]
    run: Callable[[Work, Path], None]
    missing: Callable[[Recipe], str | None]

    def why_not(self, recipe: Recipe) -> str | None:
        """Why the recipe does not have this stage, or None."""
        return self.missing(recipe)

    def texts(self, recipe: Recipe) -> list[str]:
        """Names of the texts that it reads."""
        used = ("calibration",) if self.name == "discretize" else self.sections
        found: list[str] = []
        for section in used:
            for name in ("texts", "score_texts", "search_texts", "train_texts"):
                found += getattr(getattr(recipe, section, None), name, None) or []
        return sorted(set(found))


def _has(section: str) -> Callable[[Recipe], str | None]:
    return lambda recipe: None if getattr(recipe, section) is not None else f"the recipe has no section {section}"


def _published(module: str) -> Callable[[Recipe], str | None]:
    def missing(recipe: Recipe) -> str | None:
        if recipe.publishing is None or recipe.publishing.repo_id is None:
            return "publishing.repo_id is not set"
        return None if find_spec(module) is not None else f"this release has no {module}"

    return missing


STAGES = (
    Stage("compose", COMPOSING, compose, lambda recipe: None),
    Stage("calibrate", ("calibration",), calibrate, _has("calibration")),
    Stage("search", ("search",), search, _has("search")),
    Stage("discretize", ("calibration",), discretize, _has("search")),
    Stage("finetune", ("finetune",), finetune, _has("finetune")),
    Stage("evaluate", ("evaluation",), evaluate, _has("evaluation")),
    Stage("card", ("publishing", "description"), card, _published("modeling_manticore.hub.cards")),
    Stage("push", ("publishing",), push, _published("modeling_manticore.hub.push")),
)


def _revisions(work: Work) -> list[str | None]:
    """The commits that the plan saw, so that all files are of one commit."""
    own = [component.revision for component in work.recipe.components]
    return [
        (seen or given) if component.repo else None
        for seen, given, component in zip(work.revisions, own, work.recipe.components)
    ]


def _from_scratch(work: Work) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    recipe, source = work.recipe, work.recipe.tokenizer
    if source.train_texts is not None:
        documents = [document for name in source.train_texts for document in corpus(name, work.cache_folder)]
        tokenizer = train_tokenizer(documents, source.vocab_size)
    else:
        tokenizer = load_tokenizer(source.repo or source.folder, source.revision)
    entries = [dict(component.config) | {"vocab_size": len(tokenizer)} for component in recipe.components]
    config = recipe_configuration(recipe, entries)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, key, getattr(tokenizer, key))
    dtype = torch.float32 if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    set_seed(recipe.seed)
    return AutoModelForCausalLM.from_config(config, dtype=dtype), tokenizer


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    model.save_pretrained(folder / MODEL)
    tokenizer.save_pretrained(folder / MODEL)


def _write(file: Path, values: Any) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
