"""Configuration of a hybrid: which components it has, how they are cut into paths, and how the paths are joined."""

import copy
import re
from contextlib import contextmanager
from typing import Any

from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, GenerationConfig, PreTrainedConfig, __version__
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


GATES = ("routed", "mixture", "none", "learned")
MIXTURES = ("softmax", "gumbel_softmax", "simplex")
HEAD_MIXTURES = ("last", "first")
PROJECTOR_INITS = ("identity", "random")
PROBLEM_TYPES = (None, "regression", "single_label_classification", "multi_label_classification")
PATH_KEYS = ("component", "start", "stop")
SKIP_PATH = {"component": None}
MOST_COUNTED, DEEPEST = 65_536, 16  # of layers, heads, experts, labels, ...; levels of nested values
COUNTED = re.compile(r"num_|n_(?!positions|ctx)|\w*(layer|_types)")

# Which class each Auto class of transformers finds in the code that travels with a checkpoint.
HEADS = ("ForCausalLM", "ForSequenceClassification", "ForTokenClassification")
AUTO_MAP = {"AutoConfig": "configuration_manticore.ManticoreConfig", "AutoModel": "modeling_manticore.ManticoreModel"}
AUTO_MAP |= {f"AutoModel{head}": f"modeling_manticore.Manticore{head}" for head in HEADS}

REFUSED_FAMILIES = {
    "zamba2": "its layers read the original embeddings and share weights across the depth",
    "zamba": "its layers read the original embeddings and share weights across the depth",
    "rwkv": "its state is a list of tensors that transformers' caches cannot hold",
    "xlstm": "its state is a cache class of its own that transformers' caches cannot hold",
    "minimax": "its state is a cache class of its own that transformers' caches cannot hold",
}
if tuple(int(part) for part in __version__.split(".")[:2]) < (5, 23):
    REFUSED_FAMILIES["recurrent_gemma"] = "its cache holds no recurrent states before transformers 5.23"

# Libraries look up here whether a model is causal; transformers shifts smoothed labels only for the names it finds.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["manticore"] = "ManticoreForCausalLM"


class ManticoreConfig(PreTrainedConfig):
    """
    Architecture of a hybrid language model.

    Args:
        components (`list[PreTrainedConfig | dict]`): one configuration per component, in order. Besides the family's
            own fields an entry carries `source` and `revision` (where its weights came from) and `layer_arity` (what
            its layers return: 0 for a tensor, n for an n-tuple) and `projects_out` (whether its final norm is followed
            by a projection), both found out at construction when absent; where its vocabulary was changed,
            `own_vocab_size` (what it was before its rows were transplanted) and `padded_from` (first padded id).
        blocks (`list[list[dict]]`): the architecture. Each block is a list of paths
            `{"component": k, "start": i, "stop": j}`: layers [i, j) of component k. Several paths run side by side and
            are mixed; a block of one path is plain. `{"component": None}` is a skip path, at most one a block: what
            reached the block passes through. The first and the last block need a path with a component.
        hidden_size (`int`, *optional*): width D of the stream between blocks. Defaults to the widest component.
        vocab_size (`int`, *optional*): vocabulary of the one tokenizer. Defaults to that of the components.
        gate (`str`): how a path's own state and the projected states of the others are joined: "routed" (default: a
            component hears itself unprojected), "mixture" (the paper's), "none" or "learned".
        mixture (`str`): parametrisation of the mixture weights: "softmax", "gumbel_softmax" or "simplex".
        mixture_temperature (`float`): temperature of the softmax and Gumbel-softmax parametrisations.
        head_mixture (`str`): the block whose weights mix the heads: "last" (default) or "first" (the paper's code).
        project_ends (`bool`): whether stems and heads are joined by projectors, or by plain padding and cutting.
        projector_init (`str`): "identity" (rectangular identity, default) or "random".
        initializer_range (`float`): standard deviation for new weights such as classification heads.
        tokenizer_from (`int`): index of the component whose tokenizer and generation settings the hybrid has.

    Derived: `num_hidden_layers` (number of blocks), `max_position_embeddings` (smallest finite limit of the components
    used, or None), `tie_word_embeddings` (whether a head shares its own stem's matrix).

    Raises:
        ValueError: names the field, the index, what was given and what is allowed.
    """

    model_type = "manticore"
    keys_to_ignore_at_inference = ["past_key_values", "cache"]

    components: list | None = None
    blocks: list | None = None
    hidden_size: int | None = None
    vocab_size: int | None = None
    gate: str = "routed"
    mixture: str = "softmax"
    mixture_temperature: float = 1.0
    head_mixture: str = "last"
    project_ends: bool = True
    projector_init: str = "identity"
    initializer_range: float = 0.02
    tokenizer_from: int = 0
    num_hidden_layers: int | None = None
    max_position_embeddings: int | None = None
    tie_word_embeddings: bool = False
    use_cache: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self, **kwargs):
        _check_values(kwargs | {key: v for key, v in vars(self).items() if key != "components"}, "config")
        self.components = [
            _component_config(entry, k) for k, entry in enumerate(_as_list(self.components, "components"))
        ]
        self.blocks = [_block(block, b) for b, block in enumerate(_as_list(self.blocks, "blocks"))]
        self._validate_options()
        if self.components or self.blocks:
            self._validate_layout()
            self._derive()
        super().__post_init__(**kwargs)
        if self.dtype is not None and not hasattr(self.dtype, "itemsize"):
            raise ValueError(f"dtype: got {self.dtype!r}, allowed are the dtypes of torch.")
        for write in (self.own_fields, *(component.to_dict for component in self.components)):
            write()  # what cannot be written again is no configuration

    def __setattr__(self, key: str, value: Any) -> None:
        """A new vocabulary size is that of every component, once the layout is known; it has no padding."""
        super().__setattr__(key, value)
        if key == "vocab_size" and self.__dict__.get("num_hidden_layers"):
            for component in self.components:
                if component.vocab_size != value:
                    component.vocab_size, component.padded_from = value, None

    @property
    def _attn_implementation(self) -> str | None:
        """The attention implementation asked for; setting it asks it of every component too."""
        return self._attn_implementation_internal

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict | None) -> None:
        PreTrainedConfig._attn_implementation.fset(self, value)
        for component in (self.components or ()) if value is not None else ():
            component._attn_implementation = self._attn_implementation_internal

    # ------------------------------------------------------------------ validation
    def _validate_options(self) -> None:
        for field, allowed in (
            ("gate", GATES),
            ("mixture", MIXTURES),
            ("head_mixture", HEAD_MIXTURES),
            ("projector_init", PROJECTOR_INITS),
            ("problem_type", PROBLEM_TYPES),
        ):
            if (value := getattr(self, field)) not in allowed:
                raise ValueError(f"{field}: got {value!r}, allowed are {', '.join(map(repr, allowed))}.")
        if not isinstance(self.project_ends, bool):
            raise ValueError(f"project_ends: got {self.project_ends!r}, allowed are True and False.")
        for field in ("mixture_temperature", "initializer_range"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                raise ValueError(f"{field}: got {value!r}, allowed is a positive finite number.")
        for field in ("hidden_size", "vocab_size"):
            value = getattr(self, field)
            if value is not None and (not _is_int(value) or value < 1):
                raise ValueError(f"{field}: got {value!r}, allowed is a positive integer or None.")

    def _validate_layout(self) -> None:
        for field, what in (("components", "configuration"), ("blocks", "block")):
            if not getattr(self, field):
                raise ValueError(f"{field}: got an empty list, allowed is at least one {what}.")
        count = len(self.components)
        for b, block in enumerate(self.blocks):
            real = self.real_paths(b)
            if len(block) - len(real) > 1:
                raise ValueError(f"blocks[{b}]: got {len(block) - len(real)} skip paths, allowed is at most one.")
            if not real and b in (0, len(self.blocks) - 1):
                raise ValueError(f"blocks[{b}]: got only a skip path; the first and the last block need a component.")
            for p in real:
                path, where = block[p], f"blocks[{b}][{p}]"
                if not 0 <= path["component"] < count:
                    raise ValueError(f"{where}.component: got {path['component']}, allowed is 0..{count - 1}.")
                depth = self.components[path["component"]].num_hidden_layers
                if not 0 <= path["start"] < path["stop"] <= depth:
                    raise ValueError(
                        f"{where}: got layers [{path['start']}, {path['stop']}), allowed is 0 <= start < stop <= "
                        f"{depth}, the depth of component {path['component']}."
                    )
        if not _is_int(self.tokenizer_from) or not 0 <= self.tokenizer_from < count:
            raise ValueError(f"tokenizer_from: got {self.tokenizer_from!r}, allowed is 0..{count - 1}.")
        widest = max(component.hidden_size for component in self.components)
        if self.hidden_size is not None and self.hidden_size < widest:
            raise ValueError(f"hidden_size: got {self.hidden_size}, allowed is at least {widest}, the widest.")
        sizes = [component.vocab_size for component in self.components]
        expected = sizes[self.tokenizer_from] if self.vocab_size is None else self.vocab_size
        for k, size in enumerate(sizes):
            if size != expected:
                text = f"got {size}, allowed is {expected}: all components of a hybrid share one vocabulary."
                raise ValueError(f"components[{k}].vocab_size: {text}")

    def _derive(self) -> None:
        self.hidden_size = self.hidden_size or max(component.hidden_size for component in self.components)
        self.vocab_size = self.components[self.tokenizer_from].vocab_size
        self.num_hidden_layers = len(self.blocks)
        limits = [getattr(self.components[k], "max_position_embeddings", None) for k in self.used_components]
        limits = [limit for limit in limits if _is_int(limit) and limit > 0]
        self.max_position_embeddings = min(limits) if limits else None
        self.tie_word_embeddings = bool(self.tied_components)
        source = self.components[self.tokenizer_from]
        for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(self, field) is None:
                setattr(self, field, getattr(source, field, None))

    # ------------------------------------------------------------------ layout, derived from `blocks`
    @property
    def used_components(self) -> list[int]:
        """Indices of the components that have at least one path."""
        return sorted({path["component"] for block in self.blocks for path in block} - {None})

    def real_paths(self, block: int) -> list[int]:
        """Indices of the paths of a block that have a component: all but a skip path."""
        return [p for p, path in enumerate(self.blocks[block]) if path["component"] is not None]

    def skip_path(self, block: int) -> int | None:
        """Index of the skip path of a block, or None."""
        return next((p for p, path in enumerate(self.blocks[block]) if path["component"] is None), None)

    @property
    def stem_components(self) -> list[int]:
        """Components that have a stem: those with a path in the first block."""
        return sorted({path["component"] for path in self.blocks[0]} - {None})

    @property
    def head_block(self) -> int:
        """Index of the block whose mixture weights mix the heads."""
        return len(self.blocks) - 1 if self.head_mixture == "last" else 0

    @property
    def head_components(self) -> list[int]:
        """Components that have a head: those with a path in `head_block`."""
        return sorted({path["component"] for path in self.blocks[self.head_block]} - {None})

    @property
    def tied_components(self) -> list[int]:
        """Components whose head shares the matrix of their own stem."""
        ends = set(self.stem_components) & set(self.head_components)
        return [k for k in sorted(ends) if getattr(self.components[k], "tie_word_embeddings", False)]

    def depth(self, component: int) -> int:
        """Number of layers of a component."""
        return self.components[component].num_hidden_layers

    def norm_in_head(self, component: int) -> bool:
        """
        Whether the component's final norm runs in its head: because a path of its in the last block stops early, or
        because a projection to another width follows the norm (opt-350m).
        """
        if getattr(self.components[component], "projects_out", False):
            return True
        last = (self.blocks[-1][p] for p in self.real_paths(len(self.blocks) - 1))
        return any(path["component"] == component and path["stop"] < self.depth(component) for path in last)

    def ends_component(self, block: int, path: int) -> bool:
        """Whether the final norm of the component runs at the end of this path."""
        spec = self.blocks[block][path]
        if spec["stop"] < self.depth(spec["component"]) or getattr(
            self.components[spec["component"]], "projects_out", False
        ):
            return False
        return block < len(self.blocks) - 1 or not self.norm_in_head(spec["component"])

    @property
    def is_discretized(self) -> bool:
        """Whether every block has exactly one path."""
        return all(len(block) == 1 for block in self.blocks)

    # ------------------------------------------------------------------ construction and serialisation
    @classmethod
    def from_partition(
        cls, components: list, num_blocks: int, skip_paths: bool = False, **kwargs
    ) -> "ManticoreConfig":
        """
        Cut every component as evenly as possible into `num_blocks` consecutive slices, one path per component and
        block. Depths need not be divisible. Other keywords are those of the constructor.

        Args:
            skip_paths: also give every block but the first and the last a skip path, so that search can drop depth.

        Raises:
            ValueError: `num_blocks` is not between 1 and the depth of the shallowest component, or no bool.
        """
        if not isinstance(skip_paths, bool):
            raise ValueError(f"skip_paths: got {skip_paths!r}, allowed are True and False.")
        components = [_component_config(entry, k) for k, entry in enumerate(_as_list(components, "components"))]
        if not components:
            raise ValueError("components: got an empty list, allowed is at least one configuration.")
        shallowest = min(component.num_hidden_layers for component in components)
        if not _is_int(num_blocks) or not 1 <= num_blocks <= shallowest:
            raise ValueError(f"num_blocks: got {num_blocks!r}, allowed is 1..{shallowest}, the shallowest depth.")
        depths = [component.num_hidden_layers for component in components]
        blocks = [
            [
                {"component": k, "start": depth * b // num_blocks, "stop": depth * (b + 1) // num_blocks}
                for k, depth in enumerate(depths)
            ]
            + [{"component": None}] * (skip_paths and 0 < b < num_blocks - 1)
            for b in range(num_blocks)
        ]
        return cls(components=components, blocks=blocks, **kwargs)

    def own_fields(self) -> dict[str, Any]:
        """`to_dict` without the components, which are None."""
        components, self.components = self.components, None
        try:
            return super().to_dict()
        finally:
            self.components = components

    def to_dict(self) -> dict[str, Any]:
        """Dictionary of plain values; components are dictionaries with their `model_type`."""
        return self.own_fields() | {"components": [_component_dict(component) for component in self.components]}


class OwnGenerationConfig(GenerationConfig):
    """What a fresh model generates by; its components, which are slow to write out, have no say in that."""

    @classmethod
    def from_model_config(cls, model_config: ManticoreConfig) -> GenerationConfig:
        """As in transformers."""
        return GenerationConfig.from_model_config(model_config.own_fields())


def _component_dict(component: PreTrainedConfig) -> dict[str, Any]:
    entry = _without_code(component.to_diff_dict()) | {"model_type": component.model_type}
    return {key: value for key, value in entry.items() if key not in ("transformers_version", "dtype")}


def _without_code(value: Any) -> Any:
    """A copy without `auto_map`, at every depth: the code that a component's names does not come along."""
    if isinstance(value, dict):
        return {key: _without_code(inner) for key, inner in value.items() if key != "auto_map"}
    return [_without_code(inner) for inner in value] if isinstance(value, list) else copy.deepcopy(value)


def _component_config(entry: Any, index: int) -> PreTrainedConfig:
    """A private copy of a component's configuration, from an object or a dictionary."""
    if isinstance(entry, dict):
        _check_values(entry, f"components[{index}]")
        entry = _without_code(entry)
        family = entry.pop("model_type", None)
        _check_family(family, index)
        with _named_errors(f"components[{index}]"):
            config = CONFIG_MAPPING[family](**entry)
    elif isinstance(entry, PreTrainedConfig):
        _check_family(entry.model_type, index)
        config = copy.deepcopy(entry)
    else:
        raise ValueError(f"components[{index}]: got {type(entry).__name__}, allowed are configurations, dictionaries.")
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"components[{index}]: got a quantized checkpoint, allowed are full-precision ones. "
            "Load it with `dequantize=True`, save it, and use that folder."
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise ValueError(f"components[{index}].model_type: got {config.model_type!r}, not a causal language model.")
    for field in ("hidden_size", "num_hidden_layers", "vocab_size"):
        if not _is_int(value := getattr(config, field, None)) or value < 1:
            raise ValueError(f"components[{index}].{field}: got {value!r}, allowed is a positive integer.")
    config.dtype, config.return_dict, config.output_hidden_states = None, True, False
    return config


def _check_family(family: Any, index: int) -> None:
    where = f"components[{index}].model_type"
    if not isinstance(family, str) or family not in [*CONFIG_MAPPING, *REFUSED_FAMILIES]:
        raise ValueError(f"{where}: got {family!r}, allowed are the model types of the installed transformers.")
    if family in REFUSED_FAMILIES:
        raise ValueError(f"{where}: {family!r} cannot be sliced: {REFUSED_FAMILIES[family]}.")
    if family == ManticoreConfig.model_type:
        raise ValueError(f"{where}: got 'manticore', allowed are plain models: a hybrid cannot be a component.")


def _check_values(value: Any, where: str, depth: int = 0) -> None:
    """Refuse, before a constructor counts up to it, what no configuration has: huge counts, NaN, endless nesting."""
    if isinstance(value, (dict, list, tuple)):
        if depth > DEEPEST:
            raise ValueError(f"{where}: got more than {DEEPEST} levels of nesting, allowed are at most so many.")
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            _check_values(inner, f"{where}.{key}" if isinstance(value, dict) else f"{where}[{key}]", depth + 1)
    elif isinstance(value, float) and value != value:
        raise ValueError(f"{where}: got nan, allowed is a number.")
    elif _is_int(value):
        limit = MOST_COUNTED if COUNTED.match(where.rpartition(".")[2]) else 2**53
        if abs(value) > limit:
            raise ValueError(f"{where}: got an integer of {value.bit_length()} bits, allowed is at most {limit:,}.")


@contextmanager
def _named_errors(where: str = ""):
    """Errors of transformers' own checks, of whatever class, become one ValueError that names the field."""
    try:
        yield
    except Exception as error:
        if not where and isinstance(error, ValueError) and re.match(r"[\w.\[\]]+: ", str(error)):
            raise
        field, text = re.match(r"(?:Validation error for field '(\w+)':\s*)?(.*)", str(error), re.DOTALL).groups()
        place = ".".join(filter(None, (where, field))) or "config"
        raise ValueError(f"{place}: {text if field or isinstance(error, ValueError) else repr(error)}") from error


ManticoreConfig.__init__ = _named_errors()(ManticoreConfig.__init__)


def _block(block: Any, b: int) -> list[dict[str, int | None]]:
    if not isinstance(block, (list, tuple)) or not block:
        raise ValueError(f"blocks[{b}]: got {block!r}, allowed is a non-empty list of paths.")
    return [_path(path, f"blocks[{b}][{p}]") for p, path in enumerate(block)]


def _path(path: Any, where: str) -> dict[str, int | None]:
    if path == SKIP_PATH:
        return dict(SKIP_PATH)
    if not isinstance(path, dict) or set(path) != set(PATH_KEYS):
        raise ValueError(f"{where}: got {path!r}, allowed is a dictionary of {', '.join(PATH_KEYS)}, or {SKIP_PATH}.")
    for key in PATH_KEYS:
        if not _is_int(path[key]):
            raise ValueError(f"{where}.{key}: got {path[key]!r}, allowed is an integer.")
    return {key: path[key] for key in PATH_KEYS}


def _as_list(value: Any, field: str) -> list:
    if not isinstance(value, (list, tuple, type(None))):
        raise ValueError(f"{field}: got {type(value).__name__}, allowed is a list.")
    return list(value or ())


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


__all__ = ["ManticoreConfig"]
