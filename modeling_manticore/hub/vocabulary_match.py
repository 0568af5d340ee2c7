"""How the vocabularies of a recipe's components fit together, from their tokenizers and configurations alone."""

from dataclasses import dataclass, field

from ..building.transplant import plan_vocabulary
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
        shared: of every component, the share of the hybrid's tokens that are its own too and keep their rows.
        problems: why they cannot be brought together.
    """

    size: int
    same: bool
    changed: list[int] = field(default_factory=list)
    shared: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def match_vocabularies(recipe: Recipe, facts: list[ComponentFacts]) -> VocabularyMatch:
    """What composing will do with the vocabularies: `plan_vocabulary` on the tokenizers that were read."""
    if recipe.from_scratch:
        return _of_tokenizer(recipe, facts)
    try:
        made = plan_vocabulary(
            [fact.source for fact in facts], recipe.tokenizer_from, [fact.tokenizer for fact in facts]
        )
    except ValueError as error:
        return VocabularyMatch(facts[recipe.tokenizer_from].config.vocab_size, False, problems=[str(error)])
    kept = [rows.counts["copied"] + rows.counts["same role"] for rows in made.report.components]
    changed = sorted(made.transplants)
    return VocabularyMatch(made.size, not changed, changed, [count / made.tokens for count in kept])


def _of_tokenizer(recipe: Recipe, facts: list[ComponentFacts]) -> VocabularyMatch:
    """Of components from scratch; a tokenizer yet to be trained has at most as many tokens as are asked for."""
    source, problems = recipe.tokenizer, []
    size = source.vocab_size or facts[0].config.vocab_size
    if source.train_texts is None:
        try:
            size = len(load_tokenizer(source.repo or source.folder, source.revision))
        except ValueError as error:
            problems.append(str(error))
    return VocabularyMatch(size, same=True, problems=problems)
