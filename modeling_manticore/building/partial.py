"""Loading only the part of a component that a hybrid uses: its other layers are never read, nor downloaded."""

import json
import os
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, cached_file

from ..slicing_manticore import PassThrough, find_layers, owner_of


@dataclass(frozen=True)
class ComponentPart:
    """The layers of a component that a hybrid uses, and whether it uses the embedding and the head."""

    layers: frozenset[int]
    stem: bool
    head: bool

    @classmethod
    def of(cls, config: PreTrainedConfig, k: int, heads: bool) -> "ComponentPart":
        """What a hybrid's configuration uses of component k; `heads`: whether the model has heads at all."""
        paths = [path for block in config.blocks for path in block if path["component"] == k]
        layers = frozenset(i for path in paths for i in range(path["start"], path["stop"]))
        return cls(layers, k in config.stem_components, heads and k in config.head_components)


def partial_class(config: PreTrainedConfig, part: ComponentPart) -> type[PreTrainedModel]:
    """
    The causal language model of a component's family whose unused layers, embedding and head have no parameters.
    Its `from_pretrained` therefore leaves their tensors on the disk.
    """
    family = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    family = family[0] if isinstance(family, (tuple, list)) else family
    tied = getattr(config, "tie_word_embeddings", False)

    def __init__(self, config, *args, **kwargs):
        family.__init__(self, config, *args, **kwargs)
        base = getattr(self, self.base_model_prefix)
        owner, leaf = owner_of(base, find_layers(base, config))
        layers = owner._modules[leaf]
        owner._modules[leaf] = nn.ModuleList(
            layer if i in part.layers else PassThrough(layer, 0) for i, layer in enumerate(layers)
        )
        unused = [] if part.head else [self.get_output_embeddings()]
        unused += [] if part.stem or (part.head and tied) else [self.get_input_embeddings()]
        for module in unused:
            name = next(name for name, other in self.named_modules() if other is module)
            owner, leaf = owner_of(self, name)
            owner._modules[leaf] = nn.Identity()
        if unused:
            self.all_tied_weights_keys = {}

    members = {"__init__": __init__, "__module__": family.__module__, "_keys_to_ignore_on_load_unexpected": [".*"]}
    return type(family.__name__, (family,), members)


def shards_with_unused_left_out(
    name: str, config: PreTrainedConfig, part: ComponentPart, options: dict[str, Any]
) -> list[str] | None:
    """The shards of a repository that hold something used; None where there is one file, or all are needed."""
    index = _index(name, options)
    if index is None:
        return None
    needed = {shard for key, shard in index["weight_map"].items() if not is_unused(key, config, part)}
    return sorted(needed) if needed < set(index["weight_map"].values()) else None


@contextmanager
def needed_shards(name: str, config: PreTrainedConfig, part: ComponentPart, options: dict[str, Any]):
    """
    A name to load from that has no shard of unused layers only, and the options to load it: for a repository with such
    shards a temporary folder with links to the others, else `name` itself.
    """
    shards = shards_with_unused_left_out(name, config, part, options)
    if shards is None:
        yield name, options
        return
    index = _index(name, options)
    kept = {key: shard for key, shard in index["weight_map"].items() if shard in shards}
    with TemporaryDirectory(prefix="manticore-shards-") as folder:
        for file in [CONFIG_NAME, GENERATION_CONFIG_NAME, *shards]:
            found = _cached(name, file, options)
            if found is not None:
                os.symlink(os.path.realpath(found), Path(folder, file))
        Path(folder, SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index | {"weight_map": kept}))
        yield folder, {}


def _index(name: str, options: dict[str, Any]) -> dict[str, Any] | None:
    """The shard index of a repository in the cache; None for folders, variants and single files."""
    if Path(name).is_dir() or options.get("variant") or options.get("trust_remote_code"):
        return None
    file = _cached(name, SAFE_WEIGHTS_INDEX_NAME, options)
    return None if file is None else json.loads(Path(file).read_text())


def _cached(name: str, file: str, options: dict[str, Any]) -> str | None:
    finding = {key: value for key, value in options.items() if key not in ("trust_remote_code", "variant")}
    return cached_file(name, file, **finding, _raise_exceptions_for_missing_entries=False)


def is_unused(key: str, config: PreTrainedConfig, part: ComponentPart) -> bool:
    """Whether a tensor's name on disk says that it is of a layer that is not used."""
    found = re.search(r"(^|\.)(layers|h|blocks)\.(\d+)\.", key)
    return found is not None and int(found[3]) < config.num_hidden_layers and int(found[3]) not in part.layers
