"""What is known of a component without its weights: configuration, file headers, licence, sizes, vocabulary."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    NotASafetensorsRepoError,
    SafetensorsParsingError,
    StrictDataclassError,
)
from huggingface_hub.repocard import metadata_load
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_NAME
from yaml import YAMLError

from ..building.names import hint
from ..building.partial import ComponentPart, is_unused
from ..building.sources import TOKENIZER_FILES, ComponentSource, component_sources
from ..configuration_manticore import ManticoreConfig
from .recipe_schema import ComponentRecipe


PATIENCE = 10.0  # seconds without an answer
NOT_NEEDED = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".onnx", ".gguf", ".ot", ".tflite", ".safetensors")
HTTP_ERROR = HfHubHTTPError.__mro__[1]  # of the HTTP library that the installed huggingface_hub speaks through
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass
class ComponentFacts:
    """
    One component.

    Args:
        revision: the commit, of a repository. dtype: in which `from_components` takes it to be.
        tensors: name -> (dtype as safetensors names it, shape). shards: name -> file. sizes: file -> bytes.
        license: an id or 'unknown'; license_from says where it was found. gated: 'auto', 'manual' or False.
        source: what composing would load it from; None of a fresh one. tokenizer: None where there is none.
    """

    index: int
    name: str
    config: PreTrainedConfig
    dtype: torch.dtype
    revision: str | None = None
    on_hub: bool = False
    tensors: dict[str, tuple[str, tuple[int, ...]]] = field(default_factory=dict)
    shards: dict[str, str] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    license: str = "unknown"
    license_from: str = "nowhere"
    gated: str | bool = False
    source: ComponentSource | None = None
    tokenizer: PreTrainedTokenizerBase | None = None

    @property
    def where(self) -> str:
        """For messages."""
        return f"components[{self.index}] ({self.name})"

    @property
    def parameters(self) -> int:
        """Numbers in its files."""
        return sum(_numbers(shape) for _, shape in self.tensors.values())

    def bytes_to_get(self, part: ComponentPart) -> int:
        """Bytes that building downloads: shards with a used tensor, configuration, tokenizer. 0 of a folder."""
        if not self.on_hub:
            return 0
        needed = {shard for name, shard in self.shards.items() if not is_unused(name, self.config, part)}
        others = sum(size for file, size in self.sizes.items() if "/" not in file and not file.endswith(NOT_NEEDED))
        return sum(self.sizes.get(shard, 0) for shard in needed) + others

    def needs_conversion(self, dtype: torch.dtype) -> bool:
        """Whether most of its numbers are stored in another dtype than this."""
        same = sum(_numbers(shape) for kind, shape in self.tensors.values() if DTYPES.get(kind) == dtype)
        return 2 * same < self.parameters

    def summary(self) -> dict[str, Any]:
        """Plain values."""
        stored: dict[str, int] = {}
        for kind, shape in self.tensors.values():
            stored[kind] = stored.get(kind, 0) + _numbers(shape)
        return {
            "name": self.name,
            "revision": self.revision,
            "model_type": self.config.model_type,
            "layers": self.config.num_hidden_layers,
            "hidden_size": self.config.hidden_size,
            "vocab_size": self.config.vocab_size,
            "tokens": None if self.tokenizer is None else len(self.tokenizer),
            "parameters": self.parameters,
            "stored_as": stored,
            "license": self.license,
            "license_from": self.license_from,
            "gated": self.gated,
        }


def component_facts(recipe: ComponentRecipe, index: int, notes: list[str]) -> ComponentFacts:
    """
    Read what there is to know of a component. Of its weights only the headers are read, of a repository by range
    requests.

    Args:
        notes: sentences on what could not be found out are added here.

    Raises:
        ValueError: it cannot be read, or cannot be a component.
    """
    if recipe.config is not None:
        config = _fresh(recipe.config, index)
        return _with_license(ComponentFacts(index, f"a fresh {config.model_type}", config, torch.float32), recipe)
    options = {"revision": [recipe.revision], "trust_remote_code": [recipe.trust_remote_code]}
    where = f"components[{index}] ({recipe.name})"
    if recipe.folder is not None and not Path(recipe.folder).is_dir():
        raise ValueError(f"{where}: there is no such folder{hint(recipe.folder)}")
    info = None if recipe.folder is not None else _repository(recipe, where)
    try:
        source = component_sources([recipe.name], options)[0]
        source.index = index
    except ValueError as error:
        raise ValueError(str(error).replace("components[0]", f"components[{index}]")) from error
    facts = ComponentFacts(index, recipe.name, source.config, source.dtype, source.revision, info is not None)
    facts.source = source
    if info is None:
        _read_folder(facts, notes)
    else:
        _read_repository(facts, info)
    try:
        own = {} if recipe.revision is None else {"revision": recipe.revision}
        facts.tokenizer = AutoTokenizer.from_pretrained(recipe.name, **own)
    except (OSError, ValueError) as error:
        if info is not None or any(Path(recipe.name, file).exists() for file in TOKENIZER_FILES):
            notes.append(f"{where}: its tokenizer cannot be read ({str(error).splitlines()[0]}).")
    return _with_license(facts, recipe)


def _fresh(settings: dict, index: int) -> PreTrainedConfig:
    try:
        return ManticoreConfig.from_partition([settings], 1).components[0]
    except (ValueError, TypeError, StrictDataclassError) as error:
        message = str(error).replace("components[0]", f"components[{index}]")
        place = "" if message.startswith("components") else f"components[{index}].config: "
        raise ValueError(f"{place}{message}") from error


def _with_license(facts: ComponentFacts, recipe: ComponentRecipe) -> ComponentFacts:
    if recipe.license is not None:
        facts.license, facts.license_from = recipe.license, f"the recipe ({recipe.license_reason})"
    return facts


def _repository(recipe: ComponentRecipe, where: str) -> Any:
    try:
        return HfApi().model_info(recipe.repo, revision=recipe.revision, files_metadata=True, timeout=PATIENCE)
    except (HTTP_ERROR, OSError) as error:
        first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ValueError(f"{where}: the Hub does not tell about it: {first}") from error


def _read_repository(facts: ComponentFacts, info: Any) -> None:
    facts.revision = info.sha
    facts.gated = info.gated or False
    facts.sizes = {sibling.rfilename: sibling.size or 0 for sibling in info.siblings or []}
    told = info.card_data.get("license") if info.card_data is not None else None
    _tell_license(facts, told, "the card")
    try:
        found = HfApi().get_safetensors_metadata(facts.name, revision=info.sha, timeout=PATIENCE)
    except (NotASafetensorsRepoError, SafetensorsParsingError) as error:
        raise ValueError(f"{facts.where}: it has no readable safetensors ({error}).") from error
    except (HTTP_ERROR, OSError) as error:
        raise ValueError(f"{facts.where}: the headers of its weights cannot be read: {error}") from error
    for shard, metadata in found.files_metadata.items():
        for name, tensor in metadata.tensors.items():
            facts.tensors[name], facts.shards[name] = (tensor.dtype, tuple(tensor.shape)), shard


def _read_folder(facts: ComponentFacts, notes: list[str]) -> None:
    folder = Path(facts.name)
    single = folder / SAFE_WEIGHTS_NAME
    shards = [single] if single.is_file() else sorted(folder.glob("model-*-of-*.safetensors"))
    for shard in shards:
        with safe_open(shard, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118 - it is no mapping
                view = opened.get_slice(name)
                facts.tensors[name] = (view.get_dtype(), tuple(view.get_shape()))
                facts.shards[name] = shard.name
    facts.sizes = {file.name: os.path.getsize(file) for file in folder.iterdir() if file.is_file()}
    if (folder / "README.md").is_file():
        try:
            _tell_license(facts, (metadata_load(folder / "README.md") or {}).get("license"), "the folder's README")
        except (YAMLError, ValueError, OSError, AttributeError) as error:
            notes.append(f"{facts.where}: the front matter of its README cannot be read ({type(error).__name__}).")


def _tell_license(facts: ComponentFacts, told: Any, place: str) -> None:
    if isinstance(told, list) and len(told) == 1:
        told = told[0]
    if isinstance(told, str) and told.strip() and len(told) < 100:
        facts.license, facts.license_from = told.strip(), place


def _numbers(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
