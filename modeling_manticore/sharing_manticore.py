"""
What the slices of one forward pass need not do each for itself: masks and rotary tables are built once and shared,
layers outside a slice cost next to nothing, and a view without layers builds no mask for every token.

The families' own code stays what runs. Their builders of masks are called through a copy of the forward of whatever
owns the layers, their rotary modules through a subclass. A graph being captured, or a caller without `Tables`, gets
the family's forward as it is.
"""

import dis
import functools
import inspect
import types
from collections.abc import Iterable, Sequence
from contextvars import ContextVar

import torch
from torch import nn
from torch.nn.modules import module as hooked
from transformers.utils.deprecation import deprecate_kwarg
from transformers.utils.generic import ModelOutput, can_return_tuple, merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .hollow_manticore import global_names


BUILDERS = "transformers.masking_utils"
LEARNING_ROPE = ("dynamic", "longrope")  # rotary types whose modules change with the positions they have seen


class Zero(nn.Module):
    """Stands for learned position embeddings where they must not be added."""

    def forward(self, *args, **kwargs) -> torch.Tensor:
        return torch.zeros(())


def same(hidden_states: torch.Tensor) -> torch.Tensor:
    """Stands for a module that must change nothing."""
    return hidden_states


class Absent:
    """
    Stands for a module or buffer that a view does without: it has every attribute, counts as initialised already, and
    is the factor 1 in whatever type is asked for.
    """

    _is_hf_initialized = True

    def __getattr__(self, name: str) -> "Absent":
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def type(self, dtype: torch.dtype) -> float:
        """The factor 1."""
        return 1.0


ABSENT = Absent()


class PassThrough(nn.Module):
    """
    Stands for a layer outside the slice: returns its hidden states as that layer would, a tensor (`arity` 0) or an
    n-tuple, and shows the layer's plain attributes, and that it had children, to code that looks at them.
    """

    _is_hf_initialized = True

    def __init__(self, layer: nn.Module, arity: int):
        super().__init__()
        shown = {
            name: value
            for name, value in vars(layer).items()
            if not name.startswith("_") and isinstance(value, (str, int, float, bool)) and name != "training"
        }
        shown |= {name: ABSENT for name, child in layer._modules.items() if child is not None}
        self.__dict__.update(
            shown, arity=arity
        )  # as `setattr` would, which is slow and runs for every layer of a model

    def forward(self, *args, **kwargs):
        hidden = args[0] if args else kwargs["hidden_states"]
        return (hidden,) + (None,) * (self.arity - 1) if self.arity else hidden


class SliceLayers(nn.ModuleList):
    """The layers of a view under their own indices; a walk of a lean forward meets only those kept, or one stub."""

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__(layers)
        self.kept = [(i, str(i)) for i, layer in enumerate(self._modules.values()) if type(layer) is not PassThrough]

    def __iter__(self):
        if torch.compiler.is_compiling():
            return iter(self._modules.values())
        tables = _TABLES.get()
        if tables is None or tables.lent or not (tables.skips and self.kept):
            return iter(self[:])
        return iter([self._modules[name] for _, name in self.kept])

    def __getitem__(self, index):
        layers, kept = self._modules, self.kept
        if torch.compiler.is_compiling():
            return list(layers.values())[index] if isinstance(index, slice) else super().__getitem__(index)
        tables = _TABLES.get()
        if tables is not None and tables.lent:
            layers = layers | {name: layer for _, name, layer in tables.lent}
            kept = [*((i, name) for i, name, _ in tables.lent), *kept]
        if not isinstance(index, slice):
            return layers[self._get_abs_string_index(index)]
        if tables is None or not tables.skips:
            return Numbered(list(layers.items())[index])
        span = range(*index.indices(len(layers)))
        walked = [(name, layers[name]) for i, name in kept if i in span]
        if not walked:  # a stub, so that what a walk leaves behind is there
            walked = list(layers.items())[index][:1]
        return Numbered(walked)

    def to_lend(self) -> list[tuple[int, str, nn.Module]]:
        """Its layers, not the stubs, for a view that runs them before its own: (index, name, layer)."""
        return [(i, name, self._modules[name]) for i, name in self.kept]


class Numbered(list):
    """Layers, of (name, layer) pairs whose names are their indices."""

    def __init__(self, entries: list):
        super().__init__([layer for _, layer in entries])
        self.entries = entries


def _enumerate(values, start: int = 0):
    """As the built-in; layers keep their own indices."""
    layers = values[:] if isinstance(values, SliceLayers) else values
    if isinstance(layers, Numbered) and start == 0:
        return [(int(name), layer) for name, layer in layers.entries]
    return enumerate(values, start)


class Plain:
    """Stands for a class of outputs: has the fields given, None for others, and what was given first as item 0."""

    def __init__(self, *values, **fields):
        self.values = values or tuple(fields.values())
        self.__dict__.update(fields)

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: int):
        return self.values[index]


class Tables:
    """
    Masks and rotary tables of one forward pass, each under all that it depends on. `skips` says whether the forward
    that runs at present walks over kept layers only, `idle` whether its view has none; `lent` are layers that it runs
    in place of stubs, those of the slices that it continues.
    """

    def __init__(self):
        self.found, self.kept, self.skips, self.idle, self.lent = {}, [], False, None, ()

    def get(self, key: tuple, inputs: tuple, build):
        """What `build()` gives for this key; `inputs` are the objects whose identity is part of the key."""
        if key not in self.found:
            self.kept.append(inputs)  # else an identity could come to mean another object
            self.found[key] = build()
        return self.found[key]


_TABLES: ContextVar[Tables | None] = ContextVar("tables of the running forward pass", default=None)


def new_tables() -> Tables | None:
    """Tables for a forward pass; None while a graph is captured, which takes the families' forwards as they are."""
    return None if torch.compiler.is_compiling() or torch.jit.is_tracing() else Tables()


class sharing:
    """
    Views that run inside build their masks and rotary tables in `tables`; None: each by itself. The view that runs
    inside runs `lent` layers, too.
    """

    def __init__(self, tables: Tables | None, lent: Sequence[tuple[int, str, nn.Module]] = ()):
        self.tables, self.lent = tables, lent

    def __enter__(self) -> None:
        if self.tables is not None:
            self.token, self.tables.lent = _TABLES.set(self.tables), self.lent

    def __exit__(self, *error) -> None:
        if self.tables is not None:
            _TABLES.reset(self.token)
            self.tables.lent = ()


def is_watched(module: nn.Module) -> bool:
    """Whether somebody hooked, replaced or compiled the forward of a module, and so counts on its being called."""
    own = module.__dict__
    hooks = own["_forward_pre_hooks"] or own["_forward_hooks"] or own["_backward_pre_hooks"] or own["_backward_hooks"]
    return bool(hooks or "forward" in own or own.get("_compiled_call_impl"))


def all_are_watched() -> bool:
    """Whether somebody hooked every module there is."""
    return bool(hooked._global_forward_pre_hooks or hooked._global_forward_hooks)


def share_tables(owner: nn.Module, layers: nn.ModuleList) -> None:
    """Let the owner of the layers of a view, and its rotary modules, build in the tables of the pass, if any."""
    owner.idle_masks = {}
    owner.runs_layers = any(not isinstance(layer, PassThrough) for layer in layers)
    owner.__class__ = _subclass(type(owner), _owner_forward)
    for child in owner.children():
        if is_pure_table(child):
            child.__class__ = _subclass(type(child), _table_forward)


def pass_on(base: nn.Module) -> None:
    """Let the base of a head without a final norm give what it gets, which the guard has found, without running."""
    family = type(base).__bases__[0] if "shares_tables" in vars(type(base)) else type(base)
    base.__class__ = _subclass(family, _empty_forward)


@functools.cache
def _subclass(family: type, own_forward) -> type:
    """
    A class with another `forward(family, self, ...)`. It has the family's name, under which transformers has noted
    what it knows of the class; so copies and pickles make it anew.
    """

    @functools.wraps(family.forward)
    def forward(self, *args, **kwargs):
        return own_forward(family, self, *args, **kwargs)

    def __reduce_ex__(self, protocol):
        return _remake, (family, own_forward), self.__dict__

    content = {"forward": forward, "__reduce_ex__": __reduce_ex__, "__module__": family.__module__}
    return type(family.__name__, (family,), content | {"__qualname__": family.__qualname__, "shares_tables": True})


def _remake(family: type, own_forward) -> nn.Module:
    kind = _subclass(family, own_forward)
    return kind.__new__(kind)


def _empty_forward(family, self, *args, **kwargs):
    given = kwargs.get("inputs_embeds")
    if given is not None and not torch.compiler.is_compiling() and _TABLES.get() is not None:
        return Plain(last_hidden_state=given)
    if "runs_layers" in vars(self):
        return _owner_forward(family, self, *args, **kwargs)
    return family.forward(self, *args, **kwargs)


def _owner_forward(family, self, *args, **kwargs):
    tables = None if torch.compiler.is_compiling() else _TABLES.get()
    if tables is None or not _needs_no_wrapper(self, args, kwargs):
        return family.forward(self, *args, **kwargs)
    forward, walks = _lean(family.forward)
    if "return_dict" in kwargs and "return_dict" not in _parameters_of(forward):
        del kwargs["return_dict"]
    before = tables.skips, tables.idle
    tables.skips, tables.idle = walks, None if self.runs_layers else self
    try:
        return forward(self, *args, **kwargs)
    finally:
        tables.skips, tables.idle = before


def _needs_no_wrapper(owner, args, kwargs) -> bool:
    """Whether the wrappers around the forward, which fill in defaults and record outputs, have nothing to do."""
    if args and (args[0] is not None or len(args) > 1):  # heads give no tokens
        return False
    if kwargs.get("use_cache") is None or kwargs.get("return_dict", True) is not True or "is_causal" in kwargs:
        return False
    if any(map(kwargs.get, _outputs_among(tuple(kwargs)))):
        return False
    config = owner.config
    settings = object.__getattribute__(config, "__dict__")  # a configuration is slow to ask
    return (
        settings.get("is_causal") is None
        and settings.get("return_dict", True)
        and not hasattr(type(config), "is_causal")
        and not (owner.training and getattr(owner, "gradient_checkpointing", False))
    )


@functools.cache
def _outputs_among(names: tuple[str, ...]) -> tuple[str, ...]:
    """Of the names of arguments those that ask for more outputs."""
    return tuple(name for name in names if name.startswith("output_"))


def _nothing(self) -> None:
    """A forward, to see what transformers' wrappers make of one."""


RENAMED = deprecate_kwarg(
    "past_key_values", "5.40.0", new_name="cache"
)  # from transformers 5.24 on; ours say the new name
WRAPPERS = {
    wrap(_nothing).__code__ for wrap in (can_return_tuple, capture_outputs, merge_with_config_defaults, RENAMED)
}


@functools.cache
def _lean(family) -> tuple[types.FunctionType, bool]:
    """
    (A copy of a family's forward without its outer wrappers, that asks the tables of the pass before it builds masks;
    whether all that it does with its layers is to walk over them).
    """
    inner = family
    while getattr(inner, "__code__", None) in WRAPPERS:
        inner = inner.__wrapped__
    if hasattr(inner, "__wrapped__") or not isinstance(inner, types.FunctionType):
        return family, False
    own = inner.__globals__
    builders = {
        name: _shared(f) for name, f in own.items() if getattr(f, "__module__", None) == BUILDERS and callable(f)
    }
    outputs = {name: Plain for name, kind in own.items() if isinstance(kind, type) and issubclass(kind, ModelOutput)}
    names = own | builders | outputs | {"enumerate": _enumerate}
    copy = types.FunctionType(inner.__code__, names, inner.__name__, inner.__defaults__, inner.__closure__)
    copy.__kwdefaults__ = inner.__kwdefaults__
    return copy, not COUNTING & global_names(inner.__code__)


@functools.cache
def _parameters_of(forward) -> frozenset[str]:
    """Names of the arguments; of a forward with its wrappers also what they take."""
    return frozenset(inspect.signature(forward).parameters) | (
        {"return_dict"} if hasattr(forward, "__wrapped__") else set()
    )


COUNTING = {"len", "range", "zip", "map", "reversed", "iter"}


def _shared(builder):
    """A builder of masks that builds each mask once a pass."""

    @functools.wraps(builder)
    def build(*args, **kwargs):
        tables, key = _TABLES.get(), None
        if tables is not None and not args and {"config", "inputs_embeds"} <= kwargs.keys():
            if tables.idle is not None and kwargs["inputs_embeds"].shape[1] == 1:
                return _idle_mask(tables.idle, builder, kwargs)
            key = _mask_key(builder, **kwargs)
        return builder(*args, **kwargs) if key is None else tables.get(key, kwargs, lambda: builder(**kwargs))

    return build


def _mask_key(
    builder, config, inputs_embeds, attention_mask=None, past_key_values=None, position_ids=None, cache=None, **others
) -> tuple | None:
    """
    All that a mask depends on; None where the cache does not say. Of the embeddings only shape and kind count, of a
    cache the kinds of its layers and the tokens that all of them have seen.
    """
    seen = None
    cache = past_key_values if cache is None else cache
    if cache is not None:
        if (kinds := getattr(cache, "kinds", None)) is None:
            return None
        seen = id(cache.parent), cache.get_seq_length(), kinds
    same = tuple((name, id(value)) for name, value in others.items())
    kind = inputs_embeds.shape[:2], inputs_embeds.dtype, inputs_embeds.device
    return builder, id(config), id(attention_mask), id(position_ids), seen, same, kind


def kinds_of(layers: list) -> frozenset:
    """What is told apart of a cache's layers by masks: all but the number of tokens seen."""
    names = ("is_sliding", "is_linear", "is_dummy", "sliding_window")
    return frozenset((type(layer), *(getattr(layer, name, None) for name in names)) for layer in layers)


def _idle_mask(owner, builder, kwargs):
    """The mask of a lone token, for a view without layers, where none reads it: kept from token to token."""
    given = kwargs["inputs_embeds"]
    key = builder, len(given), given.dtype, given.device, kwargs["config"]._attn_implementation
    if key not in (found := owner.idle_masks):
        if any(len(given) != rows for _, rows, *_ in found):
            found.clear()
        names = ("attention_mask", "past_key_values", "cache", "position_ids")
        found[key] = builder(**kwargs | {name: None for name in names if name in kwargs})
    return found[key]


def is_pure_table(module: nn.Module) -> bool:
    """
    Whether what a module gives depends on its configuration, its positions and the kind of its first argument alone:
    it has no parameters or children, its rotary type learns nothing, and its code asks only for the argument's `dtype`
    and `device`.
    """
    kinds = getattr(module, "rope_type", None)
    kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
    return (
        not any(True for _ in module.parameters())
        and not any(True for _ in module.children())
        and all(isinstance(kind, str) and not any(word in kind for word in LEARNING_ROPE) for kind in kinds)
        and hasattr(module, "config")
        and _asks_for_the_kind_alone(inspect.unwrap(type(module).forward))
    )


@functools.cache
def _asks_for_the_kind_alone(function) -> bool:
    code = function.__code__
    if code.co_argcount < 3 or code.co_varnames[2] != "position_ids" or code.co_varnames[1] in code.co_cellvars:
        return False
    steps = list(dis.get_instructions(code))
    return all(
        then.opname.startswith("LOAD_ATTR") and then.argval in ("dtype", "device")
        for step, then in zip(steps, steps[1:])
        if step.opname.startswith("LOAD_FAST") and code.co_varnames[1] in _as_tuple(step.argval)
    )


def _as_tuple(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def _table_forward(family, self, x, position_ids, *args, **kwargs):
    def build():
        return family.forward(self, x, position_ids, *args, **kwargs)

    tables = None if torch.compiler.is_compiling() else _TABLES.get()
    if tables is None:
        return build()
    if tables.idle is not None and position_ids.shape[1] == 1:
        key = position_ids.shape, x.dtype, x.device, args, tuple(kwargs.items())
        found = getattr(self, "idle_table", None)
        if found is None or found[0] != key:
            self.idle_table = found = key, build()
        return found[1]
    key = family, id(self.config), id(position_ids), x.dtype, x.device, args, tuple(kwargs.items())
    return tables.get(key, (self.config, position_ids), build)


__all__ = ["Tables", "new_tables", "share_tables", "sharing"]
