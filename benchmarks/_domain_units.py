"""
What `two_domains.py` and `three_components.py` do in a unit of work: make the texts, train a component, search, give a
model its extra tokens, and score it. Nothing here decides what is compared; `_domain_plan.py` does.
"""

import json
import re
import time
from pathlib import Path

import torch
from _components import train
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, set_seed
from transformers.modeling_outputs import CausalLMOutput
from transformers.utils import logging

from modeling_manticore import HalvingOptions, ManticoreForCausalLM, calibrate, discretize, stitch
from modeling_manticore.building.costs import count
from modeling_manticore.building.texts import batches_of
from modeling_manticore.commands.models import measure
from modeling_manticore.experiments.heads import LogitEnsemble
from modeling_manticore.search.halving import halve
from modeling_manticore.tasks.language import score_texts
from modeling_manticore.tasks.text import corpus, interleave, pack, shorten, split, train_tokenizer


def work(task: dict) -> dict:
    """The record of a unit; `task` is as `experiments.units.run_units` says."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    folder = None if task["folder"] is None else Path(task["folder"])
    needs = {name: Path(needed) for name, needed in task["needs"].items()}
    return KINDS[task["kind"]](task["settings"], needs, folder)


class Texts:
    """Tokenizer, packed rows and whole test documents, as the unit "texts" left them."""

    def __init__(self, folder: Path):
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.documents: dict[str, list[str]] = json.loads((folder / "documents.json").read_text(encoding="utf-8"))
        self.rows = {domain: load_file(folder / f"{domain}.safetensors") for domain in self.documents}

    def mixed(self, part: str, rows: int, seed: int) -> torch.LongTensor:
        """(rows, length), an equal share of every domain, in an order of the seed."""
        return interleave([self.rows[domain][part] for domain in self.rows], rows, seed)


def make_texts(settings: dict, needs: dict, folder: Path) -> dict:
    """
    Every corpus is split by whole documents; a domain joins its corpora's parts. Test documents are pieces of at most
    `document_characters`, evenly spread over the test part.
    """
    parts = {
        domain: [split(shorten(corpus(name), settings["characters"])) for name in names]
        for domain, names in settings["domains"].items()
    }
    training = [text for splits in parts.values() for own in splits for text in own.train]
    tokenizer = train_tokenizer(training, settings["vocabulary"])
    tokenizer.save_pretrained(folder)
    documents, record = {}, {"rows": {}, "test_bytes": {}}
    for domain, splits in parts.items():
        rows = {
            part: pack(tokenizer, [text for own in splits for text in getattr(own, part)], settings["length"])
            for part in ("train", "search")
        }
        save_file(rows, folder / f"{domain}.safetensors")
        size = settings["document_characters"]
        pieces = [text[i : i + size] for own in splits for text in own.test for i in range(0, len(text), size)]
        pieces = [piece for piece in pieces if piece.strip()]
        wanted = min(len(pieces), settings["test_documents"])
        documents[domain] = [pieces[round(i)] for i in torch.linspace(0, len(pieces) - 1, wanted).tolist()]
        record["rows"][domain] = {part: len(found) for part, found in rows.items()}
        record["test_bytes"][domain] = [len(text.encode("utf-8")) for text in documents[domain]]
    (folder / "documents.json").write_text(json.dumps(documents) + "\n", encoding="utf-8")
    return record


def train_component(settings: dict, needs: dict, folder: Path) -> dict:
    """A component from scratch, on one domain or (None) on all."""
    texts = Texts(needs["texts"])
    set_seed(1000 + settings["seed"])
    config = AutoConfig.for_model(**settings["config"])
    config.bos_token_id = config.eos_token_id = config.pad_token_id = texts.tokenizer.eos_token_id
    model = AutoModelForCausalLM.from_config(config)
    domain, tokens, seed = settings["domain"], settings["tokens"], 1000 + settings["seed"]
    length = settings["length"]
    rows = texts.mixed("train", tokens // length, seed) if domain is None else texts.rows[domain]["train"]
    found = _trained(model, rows, settings, seed, schedule="cosine")
    model.save_pretrained(folder)
    texts.tokenizer.save_pretrained(folder)
    return found | _scored(model, texts, settings)


def search(settings: dict, needs: dict, folder: None) -> dict:
    """
    The supernet's hybrids (choices of more than one component) scored without training, then all or the best of them
    fine-tuned a little and ranked. `spent` are the tokens of all that, a token read once counted once.
    """
    texts, seed = Texts(needs["texts"]), 3000 + settings["seed"]
    started = time.process_time()
    model = _supernet(settings, needs)
    calibration = texts.mixed("train", settings["calibration_rows"], seed)
    scored = texts.mixed("search", settings["scored_rows"], 1)
    report = stitch(model, calibration, scored, beam=settings["beam"], limit=settings["limit"], progress=False)
    tried = len(report.candidates)
    report.candidates = [candidate for candidate in report.candidates if len(set(candidate.choice)) > 1]
    rung = (min(1.0, settings["halved"] / len(report.candidates)), settings["halving_share"])
    options = HalvingOptions(
        tokens=settings["tokens"],
        at_most=settings["halved"],
        train_texts=texts.mixed("train", settings["tokens"] // settings["length"], seed + 1),
        learning_rate=settings["rate"],
        batch_size=settings["rows_per_step"],
        seed=seed,
        rungs=(rung,),
    )
    halve(model, report, batches_of(calibration, model), batches_of(scored, model), options, None, progress=False)
    halved = [candidate for candidate in report.candidates if candidate.tuned]
    short = max(1, round(settings["halving_share"] * settings["tokens"] / (options.batch_size * settings["length"])))
    spent = {
        "calibration": calibration.numel() * (1 + len(halved)),
        "scoring": scored.numel() * (tried + len(halved)),
        "halving": short * options.batch_size * settings["length"] * len(halved),
    }
    shown = report.candidates[: max(len(halved), settings["shown"])]
    candidates = [
        {"choice": c.choice, "loss": c.loss, "tuned": next(iter(c.tuned.values()), None), "parameters": c.parameters}
        for c in shown
    ]
    found = {"choice": report.best.choice, "candidates": candidates, "tried": tried, "method": report.method}
    return found | {"spent": spent, "search_seconds": time.process_time() - started}


def continued(settings: dict, needs: dict, folder: Path) -> dict:
    """A component that goes on with text of all domains."""
    texts = Texts(needs["texts"])
    return _extra(AutoModelForCausalLM.from_pretrained(needs["component"]), texts, settings, folder)


def hybrid(settings: dict, needs: dict, folder: None) -> dict:
    """The hybrid of a choice, calibrated, then fine-tuned; of its tokens `calibration` are those of calibration."""
    texts = Texts(needs["texts"])
    rows = texts.mixed("train", settings["calibration_rows"], 3000 + settings["seed"])
    model = discretize(_supernet(settings, needs), settings["choice"], rows, progress=False)
    before = _search_loss(model, texts, settings)
    bridges = len(model.config.blocks) - 1
    found = _extra(model, texts, settings, folder, used=rows.numel() * bridges)
    return found | {
        "search_before": before,
        "slices": model.config.blocks,
        "calibration_tokens": rows.numel() * bridges,
    }


def mixture(settings: dict, needs: dict, folder: None) -> dict:
    """The whole supernet, calibrated at uniform or random mixture weights, which stay, then fine-tuned."""
    texts, seed = Texts(needs["texts"]), settings["seed"]
    model = _supernet(settings, needs)
    if settings["weights"] == "random":
        draws = torch.Generator().manual_seed(4000 + seed)
        points = [-torch.rand(len(point), generator=draws).log() for point in model.mixture_weights()]
        model.set_mixture_weights([point / point.sum() for point in points])
    rows = texts.mixed("train", settings["calibration_rows"], 3000 + seed)
    calibrate(model, rows, progress=False)
    found = _extra(model, texts, settings, folder, used=rows.numel())
    return found | {"weights": [point.tolist() for point in model.mixture_weights()]}


def dropped(settings: dict, needs: dict, folder: None) -> dict:
    """A component without its upper or its lower half of layers, which then goes on with text of all domains."""
    texts = Texts(needs["texts"])
    return _extra(
        half_of(AutoModelForCausalLM.from_pretrained(needs["component"]), settings["kept"]), texts, settings, None
    )


def ensemble(settings: dict, needs: dict, folder: None) -> dict:
    """The mean of models' probabilities, as they are."""
    texts = Texts(needs["texts"])
    members = [AutoModelForCausalLM.from_pretrained(needs[name]).eval() for name in sorted(set(needs) - {"texts"})]
    model = _Ensemble(members).eval()
    return {"parameters": count(model), "tokens": 0} | _scored(model, texts, settings)


KINDS = {
    "texts": make_texts,
    "component": train_component,
    "search": search,
    "continued": continued,
    "hybrid": hybrid,
    "mixture": mixture,
    "dropped": dropped,
    "ensemble": ensemble,
}


def half_of(model: PreTrainedModel, kept: str) -> PreTrainedModel:
    """The same model with the first ("lower") or the last ("upper") half of its layers."""
    depth = model.config.num_hidden_layers
    low, high = (0, depth // 2) if kept == "lower" else (depth // 2, depth)
    config = AutoConfig.for_model(**model.config.to_dict() | {"num_hidden_layers": high - low})
    smaller = AutoModelForCausalLM.from_config(config)
    weights = {}
    for name, tensor in model.state_dict().items():
        layer = re.search(r"\.layers\.(\d+)\.", name)
        if layer is None:
            weights[name] = tensor
        elif low <= int(layer[1]) < high:
            weights[name.replace(layer[0], f".layers.{int(layer[1]) - low}.")] = tensor
    smaller.load_state_dict(weights)
    return smaller


class _Ensemble(LogitEnsemble):
    """As `score_texts` calls a model."""

    @property
    def device(self) -> torch.device:
        return self.members[0].device

    def forward(self, input_ids, attention_mask=None, labels=None, use_cache=None) -> CausalLMOutput:
        return CausalLMOutput(**super().forward(input_ids, attention_mask, labels))


def _supernet(settings: dict, needs: dict) -> PreTrainedModel:
    folders = [str(needs[name]) for name in sorted(set(needs) - {"texts"})]
    return ManticoreForCausalLM.from_components(folders, num_blocks=settings["blocks"])


def _extra(model: PreTrainedModel, texts: Texts, settings: dict, folder: Path | None, used: int = 0) -> dict:
    """Train on text of all domains with what is left of `tokens` after `used`, and score."""
    seed = 2000 + settings["seed"]
    rows = texts.mixed("train", max(1, settings["tokens"] // settings["length"]), seed)
    found = _trained(model, rows, settings | {"tokens": settings["tokens"] - used}, seed, schedule="linear")
    if folder is not None:
        model.save_pretrained(folder)
    return found | _scored(model, texts, settings)


def _trained(model: PreTrainedModel, rows: torch.LongTensor, settings: dict, seed: int, schedule: str) -> dict:
    steps = max(1, settings["tokens"] // (settings["rows_per_step"] * settings["length"]))
    started = time.process_time()
    train(
        model,
        rows,
        steps=steps,
        rows_per_step=settings["rows_per_step"],
        learning_rate=settings["rate"],
        seed=seed,
        schedule=schedule,
    )
    tokens = steps * settings["rows_per_step"] * settings["length"]
    return {"parameters": count(model), "tokens": tokens, "training_seconds": time.process_time() - started}


def _scored(model: PreTrainedModel, texts: Texts, settings: dict) -> dict:
    """`search`: nats a token on search rows of all domains; `nats` of every test document, and all their tokens."""
    length, nats, tokens = settings["length"], {}, {}
    for domain, documents in texts.documents.items():
        found = score_texts(model, texts.tokenizer, documents, length=length, stride=3 * length // 4)
        nats[domain] = [round(score.nats, 4) for score in found]
        tokens[domain] = sum(score.tokens for score in found)
    found = {"nats": nats, "test_tokens": tokens}
    if isinstance(model, PreTrainedModel):
        found["search"] = _search_loss(model, texts, settings)
    return found


def _search_loss(model: PreTrainedModel, texts: Texts, settings: dict) -> float:
    return measure(model, texts.mixed("search", settings["search_rows"], 0))["loss"]
