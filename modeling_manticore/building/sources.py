"""What a component given by name or folder is, checked before anything is loaded."""

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file, logging
from transformers.utils.hub import extract_commit_hash

from ..hub.transfer import HubError, call
from ..slicing_manticore import find_layers
from .names import check_name, not_here
from .partial import ComponentPart, needed_shards, partial_class, shards_with_unused_left_out


LOADING_OPTIONS = ("revision", "subfolder", "variant", "token", "cache_dir", "local_files_only", "trust_remote_code")
DESCRIPTION_FILES = ["*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "*.py"]
WEIGHT_FILES = ["model*.safetensors"]
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "spiece.model",
    "tekken.json",
    "vocab.json",
    "vocab.txt",
)

logger = logging.get_logger(__name__)


@dataclass
class ComponentSource:
    """One component: a repository or folder with its loading options, or a model in memory."""

    index: int
    name: str | None
    options: dict[str, Any]
    config: PreTrainedConfig
    dtype: torch.dtype
    revision: str | None = None
    model: PreTrainedModel | None = None
    on_hub: bool = False

    def load(self, dtype: torch.dtype, part: ComponentPart) -> PreTrainedModel:
        """
        The component on the CPU, in evaluation mode; from disk only the part that is used, its tensors mapped into
        memory where their dtype stays.

        Raises:
            ValueError: its weights cannot be read, or some of its tensors are missing or of another shape.
        """
        if self.model is not None:
            return self.model
        where = f"components[{self.index}] ({self.name})"
        if self.on_hub:
            shards = shards_with_unused_left_out(self.name, self.config, part, self.options)
            fetch_component(where, self.name, self.options, shards or WEIGHT_FILES)
        try:
            options = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
            with needed_shards(self.name, self.config, part, self.options) as (name, own):
                model, info = partial_class(self.config, part).from_pretrained(
                    name, config=copy.deepcopy(self.config), **options, **own
                )
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ValueError(f"{where}: its weights cannot be read: {error}") from error
        for problem in ("missing_keys", "mismatched_keys"):
            if info[problem]:
                raise ValueError(f"{where}: {problem.replace('_', ' ')}: {sorted(map(str, info[problem]))[:5]}.")
        return model.eval()

    def generation_config(self) -> GenerationConfig:
        """Its generation settings; those that follow from its configuration where it has none of its own."""
        if self.model is not None:
            return self.model.generation_config
        reading = {k: v for k, v in self.options.items() if k not in ("variant", "trust_remote_code")}
        try:
            return GenerationConfig.from_pretrained(self.name, **reading)
        except OSError:
            return GenerationConfig.from_model_config(self.config)


def component_sources(components: list, options: dict[str, Any]) -> list[ComponentSource]:
    """
    Check every component and read its configuration.

    Args:
        components: repository names, folders or models in memory.
        options: `LOADING_OPTIONS`, each one value for all components or a list with one per component.

    Raises:
        ValueError: names the component and what is wrong with it.
    """
    if isinstance(components, (str, Path)) or not isinstance(components, (list, tuple)) or not components:
        raise ValueError(f"components: got {components!r}, allowed is a non-empty list of names, folders or models.")
    for key, value in options.items():
        if key not in LOADING_OPTIONS:
            raise ValueError(f"{key}: unknown loading option, allowed are {', '.join(LOADING_OPTIONS)}.")
        if isinstance(value, (list, tuple)) and len(value) != len(components):
            raise ValueError(
                f"{key}: got {len(value)} values, allowed is one or {len(components)}, one per component."
            )
    sources = []
    for k, component in enumerate(components):
        own = {key: value[k] if isinstance(value, (list, tuple)) else value for key, value in options.items()}
        own = {key: value for key, value in own.items() if value is not None}
        sources.append(_source(k, component, own))
    return sources


def _source(k: int, component: Any, options: dict[str, Any]) -> ComponentSource:
    if isinstance(component, PreTrainedModel):
        _check_model(f"components[{k}]", component)
        return ComponentSource(k, None, {}, component.config, component.dtype, model=component)
    if not isinstance(component, (str, Path)):
        raise ValueError(f"components[{k}]: got {type(component).__name__}, allowed is a name, a folder or a model.")
    name = str(component)
    where = f"components[{k}] ({name})"
    options.setdefault("trust_remote_code", False)
    folder = Path(name, options.get("subfolder", ""))
    if Path(name).is_dir():
        _check_folder(where, folder, options.get("variant"))
    else:
        check_name(name, where)
    on_hub = not (Path(name).is_dir() or is_offline_mode() or options.get("local_files_only"))
    if on_hub:
        fetch_component(where, name, options, DESCRIPTION_FILES)
    reading = {key: value for key, value in options.items() if key != "variant"}
    try:
        config = AutoConfig.from_pretrained(name, **reading)
        found = cached_file(name, "config.json", **{k: v for k, v in reading.items() if k != "trust_remote_code"})
    except (OSError, HFValidationError, json.JSONDecodeError) as error:
        raise ValueError(f"{where}: its configuration cannot be read: {error}") from error
    revision = extract_commit_hash(found, None)
    dtype = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    return ComponentSource(k, name, options, config, dtype, revision, on_hub=on_hub)


def fetched(where: str, name: str, options: dict[str, Any], patterns: list[str]) -> dict[str, Any]:
    """
    Loading options of a folder or repository, with `trust_remote_code` among them; of a repository after the files
    that match the patterns are in the cache.

    Raises:
        ValueError: there is no such folder, or the files cannot be had.
    """
    check_name(name, where)
    options = dict(options)
    if not Path(name).is_dir() and not is_offline_mode():
        fetch_component(where, name, options, patterns)
    return options


def fetch_component(where: str, name: str, options: dict[str, Any], patterns: list[str]) -> None:
    """
    Bring the files of a Hub component that match the patterns into the local cache, all of one commit, by calls that
    end even where transformers' would wait for ever. `options` then name that commit, and are for the cache only.

    Raises:
        ValueError: they cannot be had, and the cache has none either (`HubError`, which is one, where the Hub or the
            connection is at fault).
    """
    folder = options.get("subfolder", "").strip("/")
    request = {
        "repo_id": name,
        "revision": options.get("revision"),
        "patterns": [f"{folder}/{pattern}" if folder else pattern for pattern in patterns],
        "cache_dir": None if options.get("cache_dir") is None else str(options["cache_dir"]),
    }
    try:
        options["revision"] = call("fetch", request, token=options.get("token"))["commit"]
    except HubError as error:
        config = f"{folder}/config.json" if folder else "config.json"
        place = {"cache_dir": options.get("cache_dir"), "revision": options.get("revision")}
        if error.kind not in ("connection", "stalled") or not isinstance(
            try_to_load_from_cache(name, config, **place), str
        ):
            also = f" {not_here(name)}" if error.kind in ("connection", "stalled", "missing", "offline") else ""
            if error.kind == "missing":  # the name is at fault, not the Hub
                raise ValueError(f"{where}: {error}{also}") from error
            raise HubError(f"{where}: {error}{also}", error.kind) from error
        logger.warning(f"{where}: {error} What the cache has is used.")
    if not options["trust_remote_code"]:  # whose code may be in another repository
        options["local_files_only"] = True


def _check_model(where: str, model: PreTrainedModel) -> None:
    """A model in memory must be its family's plain, whole causal language model."""
    family = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(model.config), None)
    if family is None:
        return  # the configuration says why it is refused
    if type(model) is not (family[0] if isinstance(family, (tuple, list)) else family):
        raise ValueError(f"{where}: got {type(model).__name__}, allowed is the causal language model of its family.")
    refuse_adapters(where, model)
    base = getattr(model, model.base_model_prefix, None)
    if base is not None:
        find_layers(base, model.config)


def refuse_adapters(where: str, model: nn.Module) -> None:
    """
    Raises:
        ValueError: the model has adapters, of `add_adapter` or `get_peft_model`.
    """
    wrapped = getattr(model, "_hf_peft_config_loaded", False) or hasattr(model, "active_peft_config")
    if wrapped or any(map(is_adapted, model.modules())):
        raise ValueError(f"{where}: it has adapters. Merge them (`merge_and_unload`) or remove them first.")


def is_adapted(module: nn.Module | None) -> bool:
    """Whether it is an adapter of PEFT around a layer."""
    return hasattr(module, "base_layer") and hasattr(module, "active_adapters")


def _check_folder(where: str, folder: Path, variant: str | None) -> None:
    """A local folder must hold a configuration and complete safetensors, and be no adapter."""
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            f"{where}: it is an adapter, not a model. Merge it into its base (`merge_and_unload`) and save that."
        )
    if not (folder / "config.json").is_file():
        raise ValueError(f"{where}: it has no config.json.")
    suffix = f".{variant}" if variant else ""
    single = folder / SAFE_WEIGHTS_NAME.replace(".safetensors", f"{suffix}.safetensors")
    index = folder / SAFE_WEIGHTS_INDEX_NAME.replace(".index.json", f"{suffix}.index.json")
    if single.is_file():
        shards = [single]
    elif index.is_file():
        try:
            weight_map = json.loads(index.read_text())["weight_map"]
        except (json.JSONDecodeError, KeyError) as error:
            raise ValueError(f"{where}: {index.name} is not a shard index.") from error
        shards = [folder / shard for shard in sorted(set(weight_map.values()))]
    else:
        others = sorted(
            path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".h5")
        )
        found = f"; it has {', '.join(others)}, which is not read because it may be pickle" if others else ""
        raise ValueError(f"{where}: it has no {single.name}{found}. Convert it to safetensors.")
    for shard in shards:
        if not shard.is_file():
            raise ValueError(f"{where}: the shard {shard.name} is missing.")
        try:
            with safe_open(shard, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{where}: {shard.name} is corrupt: {error}.") from error


def tokens_of(name: str, options: dict[str, Any]) -> dict[str, int] | None:
    """The vocabulary of the tokenizer that a repository or folder has, or None; `options` are `LOADING_OPTIONS`."""
    folder = Path(name, options.get("subfolder", ""))
    if Path(name).is_dir() and not any((folder / file).exists() for file in TOKENIZER_FILES):
        return None
    reading = {key: value for key, value in options.items() if key != "variant"}
    try:
        return AutoTokenizer.from_pretrained(name, **reading).get_vocab()
    except OSError:
        return None
