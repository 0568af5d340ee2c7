"""Successive halving: fine-tune the best candidates of a training-free search a little, and rank them again."""

import hashlib
import json
import math
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PrinterCallback

from ..building.discretize import discretize
from ..building.states import Batch
from ..building.texts import batches_of
from ..progress import progress_bar
from .slices import held_out_loss, labels_of
from .stitch_report import Candidate, StitchReport, write_json


RUNGS = ((0.5, 0.05), (0.25, 0.15))  # (part of the candidates, share of the token budget)
RESULTS_NAME = "halving.json"


@dataclass
class HalvingOptions:
    """
    By default the best half of the candidates is fine-tuned on 5 % of a token budget, the best quarter on 15 %. Each
    is a run of its own from the calibrated hybrid with its own linear decay, so that a result depends on its candidate
    alone and a killed search goes on where it was.

    Args:
        tokens: the whole fine-tuning budget.
        at_most: candidates in the first rung at most, half as many in the second.
        train_texts: as for `calibrate`; by default the calibration texts, repeated as often as the tokens need.
        learning_rate, batch_size, warmup, seed: of every run; warmup is a share of its steps.
        rungs: the part of the candidates, and the share of the token budget that each of them is trained on; with few
            candidates ((1.0, 0.05),) compares them all.

    Raises:
        ValueError: names the field, what was given and what is allowed.
    """

    tokens: int = 1_000_000
    at_most: int = 16
    train_texts: Any = None
    learning_rate: float = 3e-4
    batch_size: int = 8
    warmup: float = 0.1
    seed: int = 0
    rungs: tuple[tuple[float, float], ...] = RUNGS

    def __post_init__(self):
        for name in ("tokens", "at_most", "batch_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: got {value!r}, allowed is a positive integer.")
        for name, low, high in (("learning_rate", 0.0, math.inf), ("warmup", 0.0, 1.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value < high:
                raise ValueError(f"{name}: got {value!r}, allowed is {low} <= {name} < {high}.")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or self.seed < 0:
            raise ValueError(f"seed: got {self.seed!r}, allowed is an integer >= 0.")
        if not self.rungs or not all(len(rung) == 2 and all(0 < value <= 1 for value in rung) for rung in self.rungs):
            raise ValueError(f"rungs: got {self.rungs!r}, allowed are pairs of numbers above 0 and at most 1.")


def halve(
    model: PreTrainedModel,
    report: StitchReport,
    calibration: list[Batch],
    scored: list[Batch],
    options: HalvingOptions,
    folder: str | Path | None,
    progress: bool = True,
) -> None:
    """
    Fine-tune in rungs, write losses on the scored text into `report`, and rank it again. With a folder every result is
    kept in `halving.json` by choice, and what is there already is not run again.

    Raises:
        ValueError: the folder holds results of another search, or the training texts cannot be read.
    """
    rows = rows_of(calibration)
    training = rows
    if options.train_texts is not None:
        training = rows_of(batches_of(options.train_texts, model, None, options.batch_size, field="train_texts"))
    fingerprint = _fingerprint(model, rows, training, rows_of(scored), options, report.order)
    file = None if folder is None else Path(folder) / RESULTS_NAME
    done = {} if file is None else _read(file, fingerprint)
    total = len(report.candidates)
    pool = list(report.candidates)
    for index, (part, share) in enumerate(options.rungs):
        count = max(1, min(math.ceil(total * part), math.ceil(options.at_most / 2**index)))
        pool = pool[:count]
        with progress_bar(pool, desc=f"fine-tuning on {share:.0%}", unit="hybrid", show=progress, leave=False) as bar:
            for candidate in bar:
                key = ",".join(map(str, candidate.choice))
                if str(share) not in done.setdefault(key, {}):
                    done[key][str(share)] = _tuned_loss(
                        model, candidate, rows, training, scored, options, share, report
                    )
                    if file is not None:
                        file.parent.mkdir(parents=True, exist_ok=True)
                        write_json(file, {"fingerprint": fingerprint, "losses": done})
                candidate.tuned[str(share)] = done[key][str(share)]
                best = min((c for c in pool if str(share) in c.tuned), key=lambda c: c.tuned[str(share)])
                bar.set_postfix_str(f"best {','.join(map(str, best.choice))} {best.tuned[str(share)]:.3f}")
        pool.sort(key=lambda c: c.rank_key)
    report.sort()


def _tuned_loss(
    model: PreTrainedModel,
    candidate: Candidate,
    rows: list[torch.LongTensor],
    training: list[torch.LongTensor],
    scored: list[Batch],
    options: HalvingOptions,
    share: float,
    report: StitchReport,
) -> float:
    from .arguments import ManticoreTrainingArguments
    from .trainer import ManticoreTrainer

    hybrid = discretize(model, candidate.choice, calibration=rows, order=report.order, progress=False)
    mean_length = sum(map(len, training)) / len(training)
    steps = max(1, round(share * options.tokens / (options.batch_size * mean_length)))
    with tempfile.TemporaryDirectory(prefix="manticore-halving-") as output:
        args = ManticoreTrainingArguments(
            output_dir=output,
            stage="finetune",
            max_steps=steps,
            per_device_train_batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            warmup_steps=round(options.warmup * steps),
            lr_scheduler_type="linear",
            seed=options.seed,
            use_cpu=model.device.type == "cpu",
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        examples = [{"input_ids": row} for row in training]
        trainer = ManticoreTrainer(model=hybrid, args=args, train_dataset=examples, data_collator=collate)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return held_out_loss(hybrid, scored)


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    """Rows of any length -> input_ids, attention_mask, labels, each (rows, longest), padded at the end."""
    rows = [example["input_ids"] for example in examples]
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
        mask[i, : len(row)] = 1
    batch = {"input_ids": ids, "labels": ids.masked_fill(mask == 0, -100)}
    return batch if bool(mask.all()) else batch | {"attention_mask": mask}


def rows_of(batches: list[Batch]) -> list[torch.LongTensor]:
    """The rows of batches without their padding, on the CPU."""
    return [row[row >= 0].cpu() for batch in batches for row in labels_of(batch)]


def _fingerprint(model, rows, training, scored, options: HalvingOptions, order: str) -> str:
    """A digest of all that a result depends on beside the choice."""
    digest = hashlib.sha256()
    config = {key: value for key, value in model.config.to_dict().items() if key != "transformers_version"}
    plain = asdict(replace(options, train_texts=None, at_most=1))
    del plain["rungs"]  # a result is kept under its share of the budget
    digest.update(json.dumps([config, plain, order], sort_keys=True, default=str).encode())
    for texts in (rows, training, scored):
        digest.update(torch.cat([*texts, torch.tensor([len(texts)])]).numpy().tobytes())
    sums = [parameter.detach().double().abs().sum().item() for parameter in model.parameters()]
    digest.update(json.dumps([f"{value:.9g}" for value in sums]).encode())
    return digest.hexdigest()[:16]


def _read(file: Path, fingerprint: str) -> dict[str, dict[str, float]]:
    if not file.is_file():
        return {}
    kept = json.loads(file.read_text(encoding="utf-8"))
    if kept.get("fingerprint") != fingerprint:
        raise ValueError(
            f"folder: {str(file)!r} holds results of a search with another model, texts or options; allowed is an "
            "empty folder, or that of the same search."
        )
    return kept["losses"]
