"""One tokenizer for all components of a hybrid: which vocabularies differ, and how each component learns the one."""

import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging

from .sources import DESCRIPTION_FILES, TOKENIZER_FILES, ComponentSource, fetched
from .vocabulary import Transplant, Vocabulary, cut, transplant


logger = logging.get_logger(__name__)


@dataclass
class ComponentRows:
    """
    Where one component's vocabulary rows come from. `own_size` is its matrices' size before, `counts` the number of
    rows by origin (copied, same role, averaged, mean row, padding); they add up to the hybrid's vocabulary.
    """

    component: int
    name: str
    own_size: int
    transplanted: bool
    counts: dict[str, int]


@dataclass
class TransplantReport:
    """The tokenizer's component, the hybrid's vocabulary, and one `ComponentRows` for each component."""

    tokenizer_from: int
    vocab_size: int
    components: list[ComponentRows] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        width = max([len(row.name) for row in self.components] + [len("component")])
        kinds = list(self.components[0].counts) if self.components else []
        lines = [f"{'component':<{width}}  own rows  " + "  ".join(f"{kind:>9}" for kind in kinds)]
        for row in self.components:
            note = "" if row.transplanted else "  (same vocabulary)"
            counts = "  ".join(f"{count:9d}" for count in row.counts.values())
            lines.append(f"{row.name:<{width}}  {row.own_size:8d}  {counts}{note}")
        lines.append(f"tokenizer of component {self.tokenizer_from}, vocabulary {self.vocab_size}")
        return "\n".join(lines)


@dataclass
class VocabularyPlan:
    """
    The vocabulary of a hybrid.

    Args:
        size: rows of every embedding and head, padding included.
        tokens: ids that the tokenizer may give; those from here on are padding.
        transplants: for each component whose matrices change, the origin of its rows.
        report: the same in numbers.
        names: of tokenizers that were given by name, by component.
    """

    size: int
    tokens: int
    transplants: dict[int, Transplant]
    report: TransplantReport
    names: dict[int, str] = field(default_factory=dict)

    def apply(self, k: int, config: PreTrainedConfig) -> None:
        """
        Write the new vocabulary into component k's configuration: its size, its token ids (those of tokens that the
        hybrid's tokenizer lacks become None), `own_vocab_size` where ids changed their meaning, `padded_from`, and
        `tokenizer_source` if its tokenizer comes from elsewhere.
        """
        if k in self.names:
            config.tokenizer_source = self.names[k]
        if k not in self.transplants:
            return
        if self.report.components[k].transplanted:
            config.own_vocab_size = config.vocab_size
        config.vocab_size = self.size
        exact = self.transplants[k].exact
        for key, value in token_ids(config).items():
            setattr(config, key, _translated(value, exact))
        if self.size > self.tokens:
            config.padded_from = self.tokens

    def generation_config(self, given: GenerationConfig) -> GenerationConfig:
        """A copy of the tokenizer component's generation settings, without ids that are cut off."""
        result = copy.deepcopy(given)
        if self.report.tokenizer_from in self.transplants:
            for key, value in token_ids(result).items():
                setattr(result, key, _translated(value, range(self.tokens)))
        return result


def token_ids(config: PreTrainedConfig | GenerationConfig) -> dict[str, int | list[int]]:
    """The fields of a configuration that hold token ids."""
    return {
        key: value
        for key, value in vars(config).items()
        if key.endswith(("token_id", "token_ids")) and value is not None
    }


def _translated(value: int | list[int], known: dict[int, int] | range) -> int | list[int] | None:
    if isinstance(value, (list, tuple)):
        return [known[i] for i in value if i in known] or None
    return known[value] if value in known else None


def plan_vocabulary(
    sources: list[ComponentSource],
    tokenizer_from: int,
    tokenizers: list | None = None,
    pad_to_multiple_of: int | None = None,
) -> VocabularyPlan:
    """
    Compare the components' vocabularies. Where all are of one size and no two tokenizers differ, nothing changes, also
    not the padding that all have. Otherwise every component gets the rows of the tokenizer of `tokenizer_from`.

    Args:
        tokenizers: one per component: a tokenizer, a name or folder, or None for the component's own.
        pad_to_multiple_of: pad the vocabulary to a multiple of this, with ids of probability 0.

    Raises:
        ValueError: an option is out of range; vocabularies differ and a tokenizer cannot be found; or a tokenizer has
            more tokens than its component has rows.
    """
    count = len(sources)
    if not isinstance(tokenizer_from, int) or isinstance(tokenizer_from, bool) or not 0 <= tokenizer_from < count:
        raise ValueError(f"tokenizer_from: got {tokenizer_from!r}, allowed is 0..{count - 1}.")
    if pad_to_multiple_of is not None and (
        isinstance(pad_to_multiple_of, bool) or not isinstance(pad_to_multiple_of, int) or pad_to_multiple_of < 1
    ):
        raise ValueError(f"pad_to_multiple_of: got {pad_to_multiple_of!r}, allowed is a positive integer or None.")
    if tokenizers is not None and (not isinstance(tokenizers, (list, tuple)) or len(tokenizers) != count):
        given = len(tokenizers) if isinstance(tokenizers, (list, tuple)) else type(tokenizers).__name__
        raise ValueError(f"tokenizers: got {given}, allowed is a list of {count}, one per component.")
    sizes = [source.config.vocab_size for source in sources]
    vocabularies: list[Vocabulary | None] = [None] * count
    if count > 1 or pad_to_multiple_of is not None:
        vocabularies = [_vocabulary(s, None if tokenizers is None else tokenizers[s.index]) for s in sources]
    reference = vocabularies[tokenizer_from]
    other = [v is not None and reference is not None and not reference.same(v) for v in vocabularies]
    changes = any(other) or len(set(sizes)) > 1
    if changes:
        _check(sources, vocabularies, tokenizer_from)
    tokens = reference.size if reference is not None and (changes or pad_to_multiple_of) else sizes[tokenizer_from]
    size = -(-tokens // pad_to_multiple_of) * pad_to_multiple_of if pad_to_multiple_of else tokens
    report, transplants = TransplantReport(tokenizer_from, size), {}
    for k, source in enumerate(sources):
        rows = transplant(reference, vocabularies[k]) if other[k] else cut(tokens, tokens)
        if other[k] or sizes[k] != size or tokens != size:
            transplants[k] = rows
        name = source.name or f"component {k} ({source.config.model_type})"
        counts = rows.counts | {"padding": size - tokens}
        report.components.append(ComponentRows(k, name, sizes[k], other[k], counts))
    if any(other):
        logger.warning(f"Vocabularies differ; rows of embeddings and heads are transplanted:\n{report}")
    names = {k: str(given) for k, given in enumerate(tokenizers or ()) if isinstance(given, (str, Path))}
    return VocabularyPlan(size, tokens, transplants, report, names)


def _check(sources: list[ComponentSource], vocabularies: list[Vocabulary | None], tokenizer_from: int) -> None:
    reference, expected = vocabularies[tokenizer_from], sources[tokenizer_from].config.vocab_size
    for k, (source, vocabulary) in enumerate(zip(sources, vocabularies)):
        size = source.config.vocab_size
        missing = [tokenizer_from] * (reference is None) + [k] * (vocabulary is None)
        if size != expected and missing:
            raise ValueError(
                f"components[{k}].vocab_size: got {size}, component {tokenizer_from} has {expected}, and component "
                f"{missing[0]} comes with no tokenizer to tell which rows belong together. Pass `tokenizers`."
            )
        if vocabulary is not None and vocabulary.size > size:
            raise ValueError(
                f"components[{k}]: its tokenizer has {vocabulary.size} tokens, allowed is at most its vocab_size, "
                f"{size}: its matrices have no rows for the others. Resize its embeddings first, or pass `tokenizers`."
            )


def _vocabulary(source: ComponentSource, given: Any) -> Vocabulary | None:
    if isinstance(given, PreTrainedTokenizerBase):
        return Vocabulary(given)
    if given is not None:
        return Vocabulary(load_tokenizer(given, f"tokenizers[{source.index}]"))
    if source.name is None:
        return None
    folder = Path(source.name, source.options.get("subfolder", ""))
    if Path(source.name).is_dir() and not any((folder / name).exists() for name in TOKENIZER_FILES):
        return None
    reading = {key: value for key, value in source.options.items() if key != "variant"}
    try:
        return Vocabulary(AutoTokenizer.from_pretrained(source.name, **reading))
    except OSError:
        return None


def load_tokenizer(name: Any, where: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """
    The tokenizer of a repository or folder, or the tokenizer given.

    Raises:
        ValueError: it is neither, or has none.
    """
    if isinstance(name, PreTrainedTokenizerBase):
        return name
    if not isinstance(name, (str, Path)):
        raise ValueError(f"{where}: got {type(name).__name__}, allowed is a tokenizer, a name or a folder.")
    options = {"trust_remote_code": False} | ({} if revision is None else {"revision": revision})
    options = fetched(f"{where} ({name})", str(name), options, DESCRIPTION_FILES)
    try:
        return AutoTokenizer.from_pretrained(str(name), **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"{where}: got {str(name)!r}, which has no tokenizer: {error}") from error


def vocabulary_tensors(view: PreTrainedModel) -> set[str]:
    """Names of a stem's or head's tensors that have one row per token."""
    modules = [view.get_input_embeddings(), view.get_output_embeddings()]
    found = {id(p) for module in modules if module is not None for p in module.parameters()}
    return {name for name, p in view.named_parameters() if id(p) in found}
