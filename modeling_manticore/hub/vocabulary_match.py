"""How the vocabularies of a recipe's components fit together, from their tokenizers and configurations alone."""

from dataclasses import dataclass, field
from typing import Any

from ..commands.models import load_tokenizer
from .component_facts import ComponentFacts
from .recipe_schema import Recipe


@dataclass
class VocabularyMatch:
    """
    Args:
        size: rows of the hybrid's embeddings and heads.
        same: whether all components have one vocabulary of one size.
        changed: components whose rows are cut or transplanted.
        shared: of every component, the share of the hybrid's tokens that its own tokenizer has under the same name;
            None without a tokenizer.
        problems: why they cannot be brought together.
    """

    size: int
    same: bool
    changed: list[int] = field(default_factory=list)
    shared: list[float | None] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def match_vocabularies(recipe: Recipe, facts: list[ComponentFacts]) -> VocabularyMatch:
    """
    Where all are of one size and no two tokenizers differ, nothing changes. Else every component gets the tokens of
    the tokenizer of `tokenizer_from`, and padding beyond them is cut.
    """
    first = facts[recipe.tokenizer_from]
    sizes = [fact.config.vocab_size for fact in facts]
    if recipe.from_scratch:
        return _of_tokenizer(recipe, facts)
    target = first.vocabulary
    shared = [_share(target, fact.vocabulary) for fact in facts]
    differ = [k for k, fact in enumerate(facts) if _differ(target, fact.vocabulary)]
    if len(set(sizes)) == 1 and not differ:
        return VocabularyMatch(sizes[0], same=True, shared=shared)
    problems: list[Any] = []
    if target is None:
        problems.append(f"{first.where}: its vocabulary is not that of the others, and it has no tokenizer.")
        return VocabularyMatch(first.config.vocab_size, False, shared=shared, problems=problems)
    size = 1 + max(target.values())
    for k, fact in enumerate(facts):
        if fact.vocabulary is None and sizes[k] != sizes[recipe.tokenizer_from]:
            problems.append(f"{fact.where}: its vocabulary is not that of {first.where}, and it has no tokenizer.")
        elif fact.vocabulary is not None and 1 + max(fact.vocabulary.values()) > sizes[k]:
            problems.append(
                f"{fact.where}: its tokenizer has {1 + max(fact.vocabulary.values())} tokens, its vocab_size is "
                f"{sizes[k]}: its matrices have no rows for the others."
            )
    changed = [k for k in range(len(facts)) if sizes[k] != size or k in differ]
    return VocabularyMatch(size, False, changed, shared, problems)


def _of_tokenizer(recipe: Recipe, facts: list[ComponentFacts]) -> VocabularyMatch:
    """Of components from scratch; a tokenizer yet to be trained has at most as many tokens as are asked for."""
    source, problems = recipe.tokenizer, []
    size = source.vocab_size or facts[0].config.vocab_size
    if source.train_texts is None:
        try:
            size = len(load_tokenizer(source.repo or source.folder, source.revision))
        except ValueError as error:
            problems.append(str(error))
    return VocabularyMatch(size, same=True, shared=[None] * len(facts), problems=problems)


def _share(target: dict[str, int] | None, own: dict[str, int] | None) -> float | None:
    return None if not target or own is None else len(target.keys() & own.keys()) / len(target)


def _differ(target: dict[str, int] | None, own: dict[str, int] | None) -> bool:
    return target is not None and own is not None and target != own
