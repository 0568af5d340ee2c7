"""What may stand in a recipe: one dataclass for each section. Nothing here loads, downloads or writes anything."""

import re
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from ..configuration_manticore import GATES, HEAD_MIXTURES, MIXTURES, PROJECTOR_INITS
from .checked import checked


STRATEGIES = ("stitch", "joint", "darts", "gaea", "dash", "none")
GRADIENT_STRATEGIES = ("joint", "darts", "gaea", "dash")
DTYPES = ("auto", "float32", "bfloat16", "float16")
ORDERS = ("sequential", "parallel")
COST_KINDS = ("attention_blocks", "parameters", "cache_bytes_per_token", "flops_per_token")
MOST_COMPONENTS, MOST_LAYERS, MOST_ROWS, MOST_STEPS = 16, 4096, 10**8, 10**8


def repository(value: str, where: str) -> None:
    """
    Raises:
        ValueError: it is no `name` or `owner/name` of the Hub.
    """
    try:
        validate_repo_id(value)
    except HFValidationError as error:
        raise ValueError(f"{where}: got {value[:80]!r}, allowed is 'name' or 'owner/name' of the Hub.") from error


def output_path(value: str, where: str) -> None:
    """
    Raises:
        ValueError: it is not a relative path inside the working folder.
    """
    parts = re.split(r"[/\\]", value)
    inside = value and not re.match(r"[/\\~]|[A-Za-z]:", value) and ".." not in parts and value.strip("./\\ ")
    if not inside or len(value) > 200 or any(ord(letter) < 32 for letter in value):
        raise ValueError(f"{where}: got {value[:80]!r}, allowed is a relative path without '..'.")


def some_text(value: str, where: str) -> None:
    """
    Raises:
        ValueError: it is empty.
    """
    if not value.strip():
        raise ValueError(f"{where}: got nothing, allowed is text.")


def text_names(default: Any = None) -> Any:
    """A field for names of texts: bible, python, topics, or .txt/.jsonl files and folders."""
    return checked(default, least=1, most=64, check=some_text)


def count(default: int | None, most: int = MOST_ROWS, least: int = 1) -> Any:
    """A field for a number of things."""
    return checked(default, least=least, most=most)


@dataclass
class ComponentRecipe:
    """One component: a repository, a folder, or the configuration of one that starts from scratch."""

    repo: str | None = checked(None, check=repository)
    folder: str | None = checked(None, check=some_text)
    config: dict | None = None
    revision: str | None = checked(None, check=some_text)
    license: str | None = checked(None, check=some_text)
    license_reason: str | None = checked(None, check=some_text)
    trust_remote_code: bool = False

    def validate(self, where: str) -> None:
        """
        Raises:
            ValueError: the fields do not fit together.
        """
        _one_of(self, ("repo", "folder", "config"), where)
        if self.revision is not None and self.repo is None:
            raise ValueError(f"{where}.revision: given without repo, allowed is only with repo.")
        if (self.license is None) != (self.license_reason is None):
            raise ValueError(f"{where}.license, {where}.license_reason: give both or neither.")
        if self.config is not None:
            if not isinstance(self.config.get("model_type"), str):
                raise ValueError(f"{where}.config.model_type: it is missing, allowed is a model type of transformers.")
            _refuse_code(self.config, f"{where}.config")

    @property
    def name(self) -> str | None:
        """Repository or folder; None of a component from scratch."""
        return self.repo or self.folder


@dataclass
class TokenizerRecipe:
    """Where the tokenizer is, if no component brings it: a repository, a folder, or texts to train one on."""

    repo: str | None = checked(None, check=repository)
    folder: str | None = checked(None, check=some_text)
    revision: str | None = checked(None, check=some_text)
    train_texts: list[str] | None = text_names()
    vocab_size: int | None = count(None, 2**20, 260)

    def validate(self, where: str) -> None:
        """
        Raises:
            ValueError: the fields do not fit together.
        """
        _one_of(self, ("repo", "folder", "train_texts"), where)
        if (self.train_texts is None) != (self.vocab_size is None):
            raise ValueError(f"{where}.train_texts, {where}.vocab_size: give both or neither.")


@dataclass
class CalibrationRecipe:
    """Projectors and bridges in closed form, as in `calibrate`."""

    texts: list[str] = checked(least=1, most=64, check=some_text)
    rows: int = count(256)
    row_length: int = count(128, 2**20, 2)
    batch_size: int = count(8, 2**16)
    order: str = checked("sequential", choices=ORDERS)


@dataclass
class LimitsRecipe:
    """Hard limits of the discretized hybrid, as in `Budget`."""

    max_attention_blocks: int | None = count(None, MOST_LAYERS, 0)
    max_parameters: int | None = count(None, 10**15, 0)
    max_cache_bytes_per_token: int | None = count(None, 10**15, 0)
    max_flops_per_token: float | None = checked(None, least=0)
    min_components: int | None = count(None, MOST_COMPONENTS)


@dataclass
class SearchRecipe:
    """How the path of every block is found; strategy none takes `choice`. Fields are those of `manticore search`."""

    strategy: str = checked("stitch", choices=STRATEGIES)
    choice: list[int] | None = checked(None, least=1, most=MOST_LAYERS)
    texts: list[str] | None = text_names()
    score_texts: list[str] | None = text_names()
    search_texts: list[str] | None = text_names()
    rows: int | None = count(None)
    row_length: int = count(128, 2**20, 2)
    batch_size: int = count(8, 2**16)
    limits: LimitsRecipe | None = None
    limit: int = count(256, 10**6)
    beam: int = count(8, 10**4)
    order: str | None = checked(None, choices=(None, *ORDERS))
    halving_tokens: int | None = count(None, 10**12)
    halving_learning_rate: float = checked(3e-4, above=0, most=10)
    steps: int = count(200, MOST_STEPS)
    learning_rate: float = checked(1e-4, least=0, most=10)
    mixture_learning_rate: float | None = checked(None, least=0, most=10)
    train_components: bool = True
    gaea_base: str = checked("joint", choices=("joint", "darts"))
    temperature_start: float = checked(1.0, above=0, most=1e3)
    temperature_end: float = checked(0.1, above=0, most=1e3)
    cost_weight: float = checked(0.0, least=0, most=1e6)
    cost_kind: str = checked("parameters", choices=COST_KINDS)
    seed: int = count(0, 2**31 - 1, 0)

    def validate(self, where: str) -> None:
        """
        Raises:
            ValueError: the fields do not fit together.
        """
        fixed, darts = self.strategy == "none", "darts" in (self.strategy, self.gaea_base)
        if fixed != (self.choice is not None):
            what = "is missing with" if fixed else "given with"
            raise ValueError(
                f"{where}.choice: {what} strategy {self.strategy!r}; allowed is one path index a block, with strategy "
                "'none'."
            )
        if not fixed and self.texts is None:
            raise ValueError(f"{where}.texts: it is missing; only strategy 'none' needs none.")
        if self.search_texts is not None and not (darts and self.strategy in ("darts", "gaea")):
            raise ValueError(f"{where}.search_texts: allowed with strategy 'darts', or 'gaea' on darts.")
        if self.halving_tokens is not None and self.strategy != "stitch":
            raise ValueError(f"{where}.halving_tokens: allowed with strategy 'stitch'.")
        if self.temperature_end > self.temperature_start:
            raise ValueError(
                f"{where}.temperature_end: got {self.temperature_end}, allowed is at most {self.temperature_start}."
            )


@dataclass
class FinetuneRecipe:
    """Training of the hybrid, as in `manticore train`; with a teacher also distillation."""

    texts: list[str] = checked(least=1, most=64, check=some_text)
    steps: int = count(200, MOST_STEPS)
    rows: int | None = count(None)
    row_length: int = count(128, 2**20, 2)
    batch_size: int = count(8, 2**16)
    gradient_accumulation_steps: int = count(1, 2**16)
    learning_rate: float = checked(1e-4, above=0, most=10)
    weight_decay: float = checked(0.0, least=0, most=10)
    warmup_steps: int = count(0, MOST_STEPS, 0)
    lr_scheduler_type: str = checked("linear", choices=("linear", "cosine", "constant", "constant_with_warmup"))
    bf16: bool = False
    gradient_checkpointing: bool = False
    seed: int = count(0, 2**31 - 1, 0)
    teacher: list[str] | None = checked(None, least=1, most=MOST_COMPONENTS, check=some_text)
    distill_weight: float | None = checked(None, least=0, most=1)
    distill_temperature: float | None = checked(None, above=0, most=1e3)
    hidden_weight: float | None = checked(None, least=0, most=1e6)

    def validate(self, where: str) -> None:
        """
        Raises:
            ValueError: the fields do not fit together.
        """
        for name in ("distill_weight", "distill_temperature", "hidden_weight"):
            if getattr(self, name) is not None and self.teacher is None:
                raise ValueError(f"{where}.{name}: given without teacher, allowed is only with one.")


@dataclass
class EvaluationRecipe:
    """Texts that the finished hybrid is measured on; no other section may name them."""

    texts: list[str] = checked(least=1, most=64, check=some_text)
    rows: int = count(256)
    row_length: int = count(128, 2**20, 2)
    batch_size: int = count(16, 2**16)
    components: bool = True


@dataclass
class PublishingRecipe:
    """Where the hybrid goes, and what its card says beyond what is measured and read."""

    repo_id: str | None = checked(None, check=repository)
    private: bool | None = None
    allow_local_sources: bool = False
    title: str | None = checked(None, check=some_text)
    description: str | None = checked(None, check=some_text)
    limits: str | None = checked(None, check=some_text)
    license: str | None = checked(None, check=some_text)
    license_reason: str | None = checked(None, check=some_text)
    language: list[str] = checked([], most=64, check=some_text)
    tags: list[str] = checked([], most=64, check=some_text)
    datasets: list[str] = checked([], most=64, check=some_text)

    def validate(self, where: str) -> None:
        """
        Raises:
            ValueError: the fields do not fit together.
        """
        if (self.license is None) != (self.license_reason is None):
            raise ValueError(f"{where}.license, {where}.license_reason: give both or neither.")


@dataclass
class Recipe:
    """One hybrid, from its components to its repository."""

    name: str = checked(check=output_path)
    components: list[ComponentRecipe] = checked(least=1, most=MOST_COMPONENTS)
    description: str | None = None
    output_folder: str | None = checked(None, check=output_path)
    num_blocks: int | None = count(None, MOST_LAYERS)
    blocks: list[list[dict]] | None = checked(None, least=1, most=MOST_LAYERS)
    skip_paths: bool = False
    tokenizer_from: int = count(0, MOST_COMPONENTS - 1, 0)
    tokenizer: TokenizerRecipe | None = None
    gate: str = checked("routed", choices=GATES)
    mixture: str = checked("softmax", choices=MIXTURES)
    head_mixture: str = checked("last", choices=HEAD_MIXTURES)
    project_ends: bool = True
    projector_init: str = checked("identity", choices=PROJECTOR_INITS)
    hidden_size: int | None = count(None, 2**20)
    dtype: str = checked("auto", choices=DTYPES)
    seed: int = count(0, 2**31 - 1, 0)
    calibration: CalibrationRecipe | None = None
    search: SearchRecipe | None = None
    finetune: FinetuneRecipe | None = None
    evaluation: EvaluationRecipe | None = None
    publishing: PublishingRecipe | None = None

    def validate(self, where: str) -> None:
        """
        Raises:
            ValueError: the sections do not fit together.
        """
        if (self.num_blocks is None) == (self.blocks is None):
            raise ValueError("num_blocks, blocks: give exactly one of the two.")
        if self.skip_paths and self.blocks is not None:
            raise ValueError("skip_paths: got true with blocks, allowed is false: list {component: null} in blocks.")
        if self.tokenizer_from >= len(self.components):
            raise ValueError(
                f"tokenizer_from: got {self.tokenizer_from}, allowed is 0..{len(self.components) - 1}, the components."
            )
        fresh = [component.config is not None for component in self.components]
        if any(fresh) != all(fresh):
            k = fresh.index(True)
            raise ValueError(f"components[{k}].config: allowed is to start all components from scratch, or none.")
        if all(fresh) and self.tokenizer is None:
            raise ValueError("tokenizer: it is missing; components from scratch bring none.")
        if not all(fresh) and self.tokenizer is not None:
            raise ValueError("tokenizer: allowed with components from scratch; others bring theirs (tokenizer_from).")
        for b, block in enumerate(self.blocks or []):
            _check_block(block, f"blocks[{b}]", len(self.components))
        self._check_search()
        self._check_texts()

    def _check_search(self) -> None:
        if self.search is None:
            return
        if self.paths == [1] * len(self.paths):
            raise ValueError("search: every block has one path, allowed is to search among several.")
        choice = self.search.choice
        if choice is None:
            return
        if len(choice) != len(self.paths):
            raise ValueError(f"search.choice: got {len(choice)} indices, allowed is one a block, {len(self.paths)}.")
        for b, (p, paths) in enumerate(zip(choice, self.paths)):
            if not 0 <= p < paths:
                raise ValueError(f"search.choice[{b}]: got {p}, allowed is 0..{paths - 1}.")

    def _check_texts(self) -> None:
        """Nothing is measured on what it was fitted to."""
        measured = set(self.evaluation.texts) if self.evaluation else set()
        for section in ("calibration", "search", "finetune"):
            used = getattr(self, section)
            for name in ("texts", "score_texts", "search_texts"):
                both = sorted(measured & set(getattr(used, name, None) or ()))
                if both:
                    raise ValueError(
                        f"evaluation.texts: got {both[0]!r}, which is in {section}.{name} too; allowed are texts that "
                        "nothing was fitted to."
                    )

    @property
    def paths(self) -> list[int]:
        """Number of paths of every block."""
        if self.blocks is not None:
            return [len(block) for block in self.blocks]
        last = self.num_blocks - 1
        return [len(self.components) + (self.skip_paths and 0 < b < last) for b in range(self.num_blocks)]

    @property
    def from_scratch(self) -> bool:
        """Whether the components start with fresh weights."""
        return self.components[0].config is not None

    @property
    def folder(self) -> str:
        """Where its stages are written."""
        return self.output_folder or f"runs/{self.name}"


def _one_of(section: Any, names: tuple[str, ...], where: str) -> None:
    if sum(getattr(section, name) is not None for name in names) != 1:
        raise ValueError(f"{', '.join(f'{where}.{name}' for name in names)}: give exactly one of them.")


def _refuse_code(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, entry in value.items():
            if key == "auto_map":
                raise ValueError(
                    f"{where}.auto_map: allowed are model types of transformers, without code of their own."
                )
            _refuse_code(entry, f"{where}.{key}")
    elif isinstance(value, list):
        for i, entry in enumerate(value):
            _refuse_code(entry, f"{where}[{i}]")


def _check_block(block: list[dict], where: str, components: int) -> None:
    if not 1 <= len(block) <= MOST_LAYERS:
        raise ValueError(f"{where}: got {len(block)} paths, allowed is at least one.")
    for p, path in enumerate(block):
        place = f"{where}[{p}]"
        if path == {"component": None}:
            continue
        if set(path) != {"component", "start", "stop"}:
            raise ValueError(f"{place}: got the keys {sorted(path)[:5]}, allowed are component, start, stop.")
        for key, value in path.items():
            if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value <= MOST_LAYERS:
                raise ValueError(f"{place}.{key}: got {str(value)[:80]}, allowed is 0..{MOST_LAYERS}.")
        if path["component"] >= components:
            raise ValueError(f"{place}.component: got {path['component']}, allowed is 0..{components - 1}.")
        if path["start"] >= path["stop"]:
            raise ValueError(f"{place}: got layers [{path['start']}, {path['stop']}), allowed is start < stop.")
