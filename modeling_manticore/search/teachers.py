"""Who teaches in distillation: a model, the uniform ensemble of several, or the logits that one left on disk."""

import inspect
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import HFValidationError
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from ..building.sources import DESCRIPTION_FILES, WEIGHT_FILES, fetched, tokens_of
from ..building.states import keep_input
from ..forward_manticore import derive_positions
from ..slicing_manticore import find_layers


COMPONENTS = "components"


class Prompt(NamedTuple):
    """
    What student and teacher read: token ids, padding mask (None: no padding) and positions, each (batch, tokens).

    `labels` is how many labels there are (not -100). `counted` (batch, tokens) are the places that have a label one
    place later and are no padding: at the last place of left padding nobody has read anything that could be taught.
    """

    input_ids: torch.LongTensor
    attention_mask: torch.Tensor | None
    position_ids: torch.LongTensor
    counted: torch.BoolTensor
    labels: torch.LongTensor
    own_positions: bool

    @classmethod
    def of(cls, inputs: dict[str, Any]) -> "Prompt":
        """
        The inputs of a language model's forward pass with labels; positions are derived as the hybrid derives them.

        Raises:
            ValueError: there are no `input_ids` or no labels.
        """
        for name in ("input_ids", "labels"):
            if inputs.get(name) is None:
                raise ValueError(
                    f"{name}: a batch has none, but has {sorted(inputs)}; distillation needs both input_ids, which "
                    "the teacher reads, and labels, which say where it is listened to (-100: not there)."
                )
        ids, mask, positions = inputs["input_ids"], inputs.get("attention_mask"), inputs.get("position_ids")
        targets = inputs.get("shift_labels")
        if targets is None:
            targets = nn.functional.pad(inputs["labels"], (0, 1), value=-100)[..., 1:]
        labelled = targets != -100
        counted = labelled if mask is None else labelled & mask.bool()
        derived = derive_positions(ids, mask, positions, 0)
        return cls(ids, mask, derived, counted, labelled.sum(), positions is not None)


@dataclass
class Lesson:
    """
    What a teacher says about the counted places, n of them in row-major order.

    Either `logits` (n, vocabulary), or the k likeliest tokens: `indices` and `log_probabilities` (n, k) and the `rest`
    of the mass (n,). `states[i]` is its state before layer i, (n, d).
    """

    logits: torch.Tensor | None = None
    indices: torch.LongTensor | None = None
    log_probabilities: torch.Tensor | None = None
    rest: torch.Tensor | None = None
    states: dict[int, torch.Tensor] = field(default_factory=dict)


class Teacher:
    """
    One or several causal language models that are run beside the student: in evaluation mode, in their own dtype,
    without gradient or cache, on the student's device (unless a device map or a quantizer placed them).

    An ensemble is the mean of the models' probabilities, as logits: log(1/K sum_k softmax(z_k)). Learning from it at
    temperature 1 is learning from each by the same weight, since mean_k KL(p_k || q) = KL(mean p || q) + constant.

    Raises:
        ValueError: a model is no causal language model of the student's vocabulary, has another tokenizer (where both
            were loaded from a place that has one), or shares weights with the student.
    """

    def __init__(self, models: list[nn.Module], student: nn.Module | None = None):
        self.models = models
        for i, model in enumerate(models):
            where = "teacher" if len(models) == 1 else f"teacher[{i}]"
            check_language_model(where, model)
            if student is None:
                continue
            check_vocabulary(where, vocabulary_of(model), student.config.vocab_size)
            check_tokenizer(where, plain(model).config.name_or_path, student.config)
            own = {id(p) for p in student.parameters()}
            if any(id(p) in own for p in model.parameters()):
                raise ValueError(f"{where}: it shares weights with the model that is trained; allowed is a copy.")
        vocabularies = [vocabulary_of(model) for model in models]
        if len(set(vocabularies)) > 1:
            raise ValueError(f"teacher: got vocabularies of {vocabularies} tokens, allowed is one size for all.")

    @property
    def vocab_size(self) -> int:
        """Entries of the logits' last axis."""
        return vocabulary_of(self.models[0])

    @torch.no_grad()
    def lesson(self, prompt: Prompt, layers: Iterable[int] = ()) -> Lesson:
        """Logits at the counted places, and the states before `layers` where there is one model."""
        states: dict[int, torch.Tensor] = {}
        handles = _watch(self.models[0], set(layers), states)
        try:
            logits = [_logits(model, prompt) for model in self.models]
        finally:
            for handle in handles:
                handle.remove()
        if len(logits) > 1:
            stacked = torch.stack([torch.log_softmax(z.float(), dim=-1) for z in logits])
            logits = [stacked.logsumexp(0) - torch.tensor(float(len(self.models))).log()]
        place = prompt.counted.device
        kept = {layer: state.to(place)[prompt.counted] for layer, state in states.items()}
        return Lesson(logits=logits[0], states=kept)


def make_teacher(given: Any, hybrid: PreTrainedModel) -> Any:
    """
    The teacher that a user named.

    Args:
        given: a causal language model, or a repository or folder of one; the index of a component of the hybrid, which
            is loaded from its recorded source; a list of such, or "components", for an ensemble; the folder of a
            teacher cache.

    Raises:
        ValueError: there is no such teacher, or its vocabulary is not the hybrid's.
    """
    from .teacher_cache import CachedTeacher, is_cache

    if isinstance(given, (str, Path)) and is_cache(given):
        return CachedTeacher(Path(given), hybrid.config.vocab_size)
    if given == COMPONENTS:
        given = hybrid.config.used_components
    if isinstance(given, (list, tuple)):
        if not given:
            raise ValueError("teacher: got an empty list, allowed is at least one model.")
        return Teacher([load_teacher(f"teacher[{i}]", one, hybrid) for i, one in enumerate(given)], hybrid)
    return Teacher([load_teacher("teacher", given, hybrid)], hybrid)


def load_teacher(where: str, given: Any, hybrid: PreTrainedModel | None = None) -> nn.Module:
    """
    A model in memory as it is, or one of a repository, of a folder, or of a component's recorded source.

    Raises:
        ValueError: there is none.
    """
    if isinstance(given, nn.Module):
        return given
    revision = None
    if isinstance(given, int) and not isinstance(given, bool) and hybrid is not None:
        count = len(hybrid.config.components)
        if not 0 <= given < count:
            raise ValueError(f"{where}: got component {given}, allowed is 0..{count - 1}.")
        component = hybrid.config.components[given]
        given, revision = getattr(component, "source", None), getattr(component, "revision", None)
        if given is None:
            raise ValueError(
                f"{where}: this component has no recorded source to load it from; allowed is the model itself."
            )
    if not isinstance(given, (str, Path)):
        raise ValueError(
            f"{where}: got {type(given).__name__}, allowed is a causal language model, a repository or folder, "
            "the index of a component, 'components', a list of models, or the folder of a teacher cache."
        )
    options = {"trust_remote_code": False} | ({} if revision is None else {"revision": revision})
    options = fetched(f"{where} ({given})", str(given), options, DESCRIPTION_FILES + WEIGHT_FILES)
    try:
        return AutoModelForCausalLM.from_pretrained(str(given), use_safetensors=True, **options)
    except (OSError, ValueError, HFValidationError) as error:
        raise ValueError(f"{where}: {str(given)!r} cannot be loaded ({str(error).splitlines()[0]})") from error


def component_taught(given: Any, teacher: Any, hybrid: PreTrainedModel) -> int:
    """
    Which component of the hybrid the teacher is.

    Args:
        given: what the user named. teacher: what `make_teacher` made of it.

    Raises:
        ValueError: none, or it cannot be told which.
    """
    if isinstance(given, int):
        return given
    models = getattr(teacher, "models", [])
    if len(models) == 1:
        config, components = models[0].config, hybrid.config.components
        alike = [k for k in hybrid.config.used_components if _shape(components[k]) == _shape(config)]
        named = [k for k in alike if getattr(components[k], "source", None) == config.name_or_path]
        found = named if len(named) == 1 else alike
        if len(found) == 1:
            return found[0]
        if found:
            raise ValueError(f"teacher: it may be any of the components {found}; with hidden_weight, give the index.")
    raise ValueError(
        "hidden_weight: hidden states can be matched with one component of the hybrid as teacher, uncut and not from "
        "a cache; allowed with this teacher is 0."
    )


def check_language_model(where: str, model: Any) -> None:
    """
    Raises:
        ValueError: it has no configuration or no output embeddings, so it gives no logits over a vocabulary.
    """
    inner = plain(model) if isinstance(model, nn.Module) else model
    if not isinstance(inner, PreTrainedModel) or inner.get_output_embeddings() is None:
        raise ValueError(f"{where}: got {type(model).__name__}, allowed is a causal language model of transformers.")


def check_vocabulary(where: str, size: int, expected: int) -> None:
    """
    Raises:
        ValueError: the sizes differ.
    """
    if size != expected:
        raise ValueError(f"{where}: got a vocabulary of {size} tokens, allowed is the hybrid's, {expected}.")


def check_tokenizer(where: str, name: str, config: PreTrainedConfig) -> None:
    """
    Raises:
        ValueError: the teacher's tokenizer and that of the hybrid (`config`) give the same text different ids.
    """
    own = getattr(config.components[config.tokenizer_from], "source", None)
    if not name or own is None or name == own:
        return
    theirs, ours = tokens_of(name, {}), tokens_of(own, {})
    if theirs is not None and ours is not None and theirs != ours:
        different = sorted({token for token, _ in theirs.items() ^ ours.items()})
        raise ValueError(
            f"{where}: the tokenizer in {name!r} differs from the hybrid's, that in {own!r}, in {len(different)} "
            f"tokens, among them {different[:3]}; allowed is a teacher that reads the same ids."
        )


def vocabulary_of(model: nn.Module) -> int:
    """Size of the vocabulary of a causal language model."""
    return plain(model).config.get_text_config().vocab_size


def plain(model: nn.Module) -> nn.Module:
    """The model under PEFT's wrapper."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def _shape(config) -> tuple:
    return config.model_type, getattr(config, "hidden_size", None), getattr(config, "num_hidden_layers", None)


def _logits(model: nn.Module, prompt: Prompt) -> torch.Tensor:
    """Logits of the counted places, (n, vocabulary), on the prompt's device."""
    inner, place = plain(model), prompt.input_ids.device
    fixed = getattr(inner, "hf_device_map", None) is not None or getattr(inner, "is_quantized", False)
    if not fixed and inner.device != place:
        model.to(place)
    if model.training:
        model.eval()
    arguments = {"input_ids": prompt.input_ids.to(inner.device), "use_cache": False}
    if prompt.attention_mask is not None:
        arguments["attention_mask"] = prompt.attention_mask.to(inner.device)
    if "position_ids" in inspect.signature(inner.forward).parameters:
        arguments["position_ids"] = prompt.position_ids.to(inner.device)
    return model(**arguments).logits.to(place)[prompt.counted]


def _watch(model: nn.Module, layers: set[int], found: dict[int, torch.Tensor]) -> list:
    """Hooks that keep the inputs of the given layers."""
    if not layers:
        return []
    inner = plain(model)
    base = getattr(inner, inner.base_model_prefix)
    modules = base.get_submodule(find_layers(base, base.config))
    return [modules[i].register_forward_pre_hook(keep_input(found, i), with_kwargs=True) for i in sorted(layers)]
