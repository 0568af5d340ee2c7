"""Is a model card fit to be pushed? The Hub's own check needs the Hub; this one needs nothing."""

import re
from typing import Any

import yaml

from .contents import paths_in_text
from .licences import LICENCES, UNSAID


REPO_ID = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]*")
RELATIONS = ("adapter", "finetune", "merge", "quantized")
TEXT, TEXTS = (str,), (str, list)
FIELDS = {
    "language": TEXTS,
    "license": TEXT,
    "license_name": TEXT,
    "license_link": TEXT,
    "library_name": TEXT,
    "pipeline_tag": TEXT,
    "base_model": TEXTS,
    "base_model_relation": TEXT,
    "tags": (list,),
    "datasets": TEXTS,
    "metrics": TEXTS,
    "model_name": TEXT,
    "model-index": (list,),
}
ENTRY = {"task": ("type",), "dataset": ("name", "type"), "metrics": ("type", "value")}


def check_card(text: str) -> None:
    """
    Front matter that parses, fields of their types, a licence id in the table, base models that are repositories, a
    complete `model-index`; no local path and no template marker anywhere.

    Raises:
        ValueError: every problem found, each naming its field.
    """
    problems = card_problems(text)
    if problems:
        raise ValueError("card: " + "; ".join(problems) + ".")


def card_problems(text: str) -> list[str]:
    """What `check_card` complains of; empty for a card that is fit."""
    problems = [f"local path {found!r}" for found in paths_in_text(text)]
    problems += [f"template marker {found!r}" for found in re.findall(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}", text)]
    problems += ["'[More Information Needed]'"] * ("[More Information Needed]" in text)
    match = re.match(r"---\s*\n(.*?)\n---\s*(?:\n|$)", text, re.DOTALL)
    if match is None:
        return [*problems, "no front matter between lines '---'"]
    try:
        front = yaml.safe_load(match.group(1))
    except yaml.YAMLError as error:
        return [*problems, f"front matter is no YAML ({str(error).splitlines()[0]})"]
    if not isinstance(front, dict):
        return [*problems, f"front matter is {type(front).__name__}, not a mapping"]
    for field, kinds in FIELDS.items():
        value = front.get(field)
        if field in front and not isinstance(value, kinds):
            problems.append(f"{field}: got {value!r}, allowed is {' or '.join(kind.__name__ for kind in kinds)}")
        elif isinstance(value, list) and field != "model-index" and not all(isinstance(v, str) and v for v in value):
            problems.append(f"{field}: got {value!r}, allowed are texts")
    problems += [f"{field}: missing" for field in ("license", "library_name", "tags") if not front.get(field)]
    licence, relation, bases = (front.get(field) for field in ("license", "base_model_relation", "base_model"))
    if isinstance(licence, str) and licence not in LICENCES and licence not in UNSAID:
        problems.append(f"license: got {licence!r}, allowed are {', '.join([*LICENCES, *UNSAID])}")
    if relation is not None and relation not in RELATIONS:
        problems.append(f"base_model_relation: got {relation!r}, allowed are {', '.join(RELATIONS)}")
    for base in [bases] if isinstance(bases, str) else bases if isinstance(bases, list) else []:
        if not isinstance(base, str) or not REPO_ID.fullmatch(base) or ".." in base:
            problems.append(f"base_model: got {base!r}, allowed are ids of repositories")
    return problems + _index_problems(front.get("model-index"))


def _index_problems(index: Any) -> list[str]:
    problems = []
    for i, model in enumerate(index if isinstance(index, list) else []):
        where = f"model-index[{i}]"
        if not isinstance(model, dict) or not model.get("name") or not isinstance(model.get("results"), list):
            problems.append(f"{where}: needs a name and a list of results")
            continue
        for r, entry in enumerate(model["results"]):
            for part, keys in ENTRY.items():
                values = entry.get(part) if isinstance(entry, dict) else None
                for value in values if part == "metrics" and isinstance(values, list) and values else [values]:
                    absent = [key for key in keys if not isinstance(value, dict) or value.get(key) is None]
                    if absent:
                        problems.append(f"{where}.results[{r}].{part}: lacks {', '.join(absent)}")
    return problems
