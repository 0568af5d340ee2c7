"""A plan: what a recipe would make and what it would take, before anything is downloaded or built."""

import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import get_token
from huggingface_hub.errors import StrictDataclassError

from ..building.costs import DEFAULT_CONTEXT, Budget, CostTable, cost_table
from ..building.discretize import merged, usable_paths
from ..building.limits import best_choice, check_feasible
from ..building.names import hint
from ..building.partial import ComponentPart
from ..cache_manticore import path_name
from ..configuration_manticore import ManticoreConfig
from ..mixing_manticore import Projector
from ..tasks.text import BUILT_IN
from .cluster import ClusterPlan, cluster_plan
from .component_facts import ComponentFacts, component_facts
from .contents import local_paths
from .recipe_schema import Recipe
from .recipes import load_recipe, recipe_to_dict
from .sizes import Sizes, build_on_meta, sizes_of, state_bytes, weight_bytes
from .vocabulary_match import VocabularyMatch, match_vocabularies


# Private memory of building beyond the tensors that it makes: 9.1 to 9.6 MB in results/building_memory.json.
BUILDING_OVERHEAD = 9.4e6


@dataclass
class Building:
    """Bytes that composing takes: new tensors at the peak, pages of mapped files, and what is downloaded."""

    private_bytes: int
    mapped_bytes: int
    download_bytes: int


@dataclass
class Plan:
    """
    What a recipe would make.

    Args:
        problems: why it cannot be made; everything that was found. notes: what else there is to know.
        supernet, hybrid: sizes; the hybrid's where its choice is known, else `smallest` and `largest`, by parameters,
            of those that the search may choose, with the choice of each.
        cluster: what training "supernet" and "hybrid" (the largest where there is no choice yet) takes on several
            GPUs, if that was asked for.
    """

    recipe: str
    components: list[dict[str, Any]] = field(default_factory=list)
    blocks: list[list[str]] = field(default_factory=list)
    dtype: str | None = None
    context: int | None = None
    hidden_size: int | None = None
    vocabulary: VocabularyMatch | None = None
    supernet: Sizes | None = None
    hybrid: Sizes | None = None
    choice: list[int] | None = None
    smallest: dict[str, Any] | None = None
    largest: dict[str, Any] | None = None
    building: Building | None = None
    cluster: dict[str, ClusterPlan] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self) | {"cluster": {name: found.to_dict() for name, found in self.cluster.items()}}

    def check(self) -> None:
        """
        Raises:
            ValueError: the recipe cannot be built; all problems.
        """
        if self.problems:
            raise ValueError(f"recipe {self.recipe}: it cannot be built. " + " ".join(self.problems))

    def __str__(self) -> str:
        from .plan_table import table

        return table(self)


@dataclass(frozen=True)
class ClusterQuestion:
    """Numbers of GPUs, sequences of a step on each, tokens of a sequence (None: those of the recipe's training)."""

    gpus: list[int]
    batch_size: int = 1
    row_length: int | None = None


def plan(recipe: Recipe | str | Path, cluster: ClusterQuestion | None = None) -> Plan:
    """
    What a recipe would make and what that would take. Read are configurations, tokenizers, the headers of weights (of
    repositories by range requests), cards and lists of files; no weights.

    Args:
        recipe: a recipe, its file, or the name of a shipped one.
        cluster: asks for memory and transfers of training on several GPUs.

    Returns:
        The plan; `print` it. `check()` raises its problems.

    Raises:
        ValueError: the file is no recipe.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    made = Plan(recipe.name)
    made.problems += _missing_texts(recipe) + _local_sources(recipe)
    if recipe.publishing is not None and recipe.publishing.repo_id is not None and not get_token():
        made.notes.append("publishing: there is no token to push with; run `hf auth login` or set HF_TOKEN before.")
    facts = _facts(recipe, made)
    if facts is None:
        return made
    try:
        config, dtype = _configuration(recipe, facts, made)
        made.dtype, made.hidden_size = str(dtype).removeprefix("torch."), config.hidden_size
        names = [fact.name for fact in facts]
        made.blocks = [[path_name(path, names) for path in block] for block in config.blocks]
        made.context = config.max_position_embeddings
        made.problems += _too_long(recipe, config)
        model = build_on_meta(config, dtype)
    except (ValueError, StrictDataclassError) as error:
        made.problems.append(str(error))
        return made
    for fact in facts:
        made.problems += _bad_tensors(fact, config)
    context = min(config.max_position_embeddings or DEFAULT_CONTEXT, DEFAULT_CONTEXT)
    states = {k: state_bytes(component, dtype) for k, component in enumerate(config.components)}
    for k, own in states.items():
        if own is None:
            made.notes.append(f"{facts[k].where}: the size of its states cannot be told without running it.")
    sizes = sizes_of(model, context, states)
    whole = recipe.evaluation is not None and recipe.evaluation.components
    made.building = _building(model, facts, dtype, made.vocabulary, whole)
    if config.is_discretized:
        made.hybrid, made.choice = sizes, [0] * len(config.blocks)
    else:
        made.supernet = sizes
        _plan_choice(recipe, made, model, context, states, dtype)
    if cluster is not None:
        _plan_cluster(recipe, made, cluster, model, context)
    return made


def _plan_cluster(recipe: Recipe, made: Plan, asked: ClusterQuestion, model: Any, context: int) -> None:
    """Training the supernet, and the hybrid of the choice or else the largest that the search may choose."""
    tokens = asked.row_length
    if tokens is None:
        tokens = next((s.row_length for s in (recipe.finetune, recipe.search) if s is not None), context)
    models = {"hybrid" if made.supernet is None else "supernet": model}
    choice = made.largest["choice"] if made.largest else made.choice
    if made.supernet is not None and choice is not None:
        models["hybrid"] = build_on_meta(merged(model.config, choice)[0], model.dtype)
    for name, trained in models.items():
        made.cluster[name] = cluster_plan(trained, asked.gpus, tokens, asked.batch_size)


def _facts(recipe: Recipe, made: Plan) -> list[ComponentFacts] | None:
    found = []
    for k, component in enumerate(recipe.components):
        try:
            found.append(component_facts(component, k, made.notes))
        except (ValueError, StrictDataclassError) as error:
            made.problems.append(str(error))
    made.components = [fact.summary() for fact in found]
    for fact in found:
        if fact.gated:
            made.notes.append(f"{fact.where}: it is gated; its terms must be accepted and a token given.")
        if fact.license == "unknown" and fact.tensors:
            text = f"{fact.where}: its licence is unknown; set the component's license and license_reason."
            publishing = recipe.publishing is not None and recipe.publishing.repo_id is not None
            (made.problems if publishing else made.notes).append(text)
    return found if len(found) == len(recipe.components) else None


def _configuration(recipe: Recipe, facts: list[ComponentFacts], made: Plan) -> tuple[ManticoreConfig, torch.dtype]:
    """As `from_components` makes it, with one vocabulary."""
    made.vocabulary = match_vocabularies(recipe, facts)
    made.problems += made.vocabulary.problems
    configs = [copy.deepcopy(fact.config) for fact in facts]
    for config, fact in zip(configs, facts):
        config.vocab_size = made.vocabulary.size
        config.source, config.revision = fact.name, fact.revision
    return recipe_configuration(recipe, configs), _dtype(recipe, facts)


def recipe_configuration(recipe: Recipe, components: list) -> ManticoreConfig:
    """
    The hybrid's configuration, of components' configurations of one vocabulary.

    Raises:
        ValueError: the architecture does not fit the components.
    """
    options = architecture(recipe)
    if recipe.num_blocks is not None:
        return ManticoreConfig.from_partition(components, recipe.num_blocks, recipe.skip_paths, **options)
    return ManticoreConfig(components=components, blocks=recipe.blocks, **options)


def architecture(recipe: Recipe) -> dict[str, Any]:
    """The recipe's options of `ManticoreConfig`."""
    names = ("gate", "mixture", "head_mixture", "project_ends", "projector_init", "hidden_size", "tokenizer_from")
    return {name: getattr(recipe, name) for name in names}


def _dtype(recipe: Recipe, facts: list[ComponentFacts]) -> torch.dtype:
    if recipe.dtype != "auto":
        return getattr(torch, recipe.dtype)
    dtype = facts[0].dtype
    for fact in facts[1:]:
        dtype = torch.promote_types(dtype, fact.dtype)
    return dtype


def _plan_choice(recipe: Recipe, made: Plan, model: Any, context: int, states: dict, dtype: torch.dtype) -> None:
    """The hybrid of the recipe's choice, or the range of those that its search may choose."""
    config, table, search = model.config, cost_table(model, context), recipe.search
    if search is None:
        made.notes.append("There is no search: what is made is the supernet itself.")
        return
    limits = search.limits
    budget = None if limits is None else Budget(**vars(limits))
    usable = usable_paths(model)

    def sizes(choice: list[int]) -> Sizes:
        return sizes_of(build_on_meta(merged(config, choice)[0], dtype), context, _kept(states, config, choice))

    if search.choice is not None:
        wrong = [b for b, p in enumerate(search.choice) if p not in usable[b]]
        if wrong:
            b = wrong[0]
            made.problems.append(f"search.choice[{b}]: got {search.choice[b]}, allowed are {list(usable[b])}.")
            return
        costs = table.of(search.choice)
        for kind, limit in (budget.limits() if budget else {}).items():
            if costs[kind] > limit:
                made.problems.append(
                    f"search.limits.max_{kind}: got {limit}, allowed is at least {costs[kind]}, what the choice has."
                )
        if len(table.components_of(search.choice)) < (budget.min_components or 1 if budget else 1):
            made.problems.append(
                f"search.limits.min_components: got {budget.min_components}, allowed is at most "
                f"{len(table.components_of(search.choice))}, what the choice has."
            )
        made.choice, made.hybrid = search.choice, sizes(search.choice)
        return
    try:
        check_feasible(table, budget, usable)
    except ValueError as error:
        made.problems.append(f"search.limits: {error}")
        return
    for name, sign in (("smallest", -1), ("largest", 1)):
        choice = _extreme(table, budget, usable, sign)
        setattr(made, name, {"choice": choice, "sizes": sizes(choice)})


def _extreme(table: CostTable, budget: Budget | None, usable: list, sign: int) -> list[int]:
    """The choice of the most (sign 1) or fewest parameters within the budget; there is one."""
    score = table.terms["parameters"].map(lambda term: sign * term)
    return best_choice(table, budget, score, usable)


def _kept(states: dict, config: ManticoreConfig, choice: list[int]) -> dict[int, Any]:
    """The states of the components of a choice, by their index in the discretized hybrid."""
    used = {config.blocks[b][p]["component"] for b, p in enumerate(choice)} - {None}
    kept = sorted(used | {config.tokenizer_from})
    return {i: states[k] for i, k in enumerate(kept)}


def _building(
    model: Any, facts: list[ComponentFacts], dtype: torch.dtype, vocabulary: VocabularyMatch, whole: bool
) -> Building:
    """
    Tensors are mapped from the files where their dtype stays and they are used once; the others, projectors and
    transplanted rows are new memory. `whole`: components are downloaded whole, to be measured by themselves.
    """
    config, sizes = model.config, weight_bytes(model)
    views = {k: [stem for i, stem in model.trunk.stems.items() if int(i) == k] for k in range(len(facts))}
    for block, specs in zip(model.trunk.blocks, config.blocks):
        for p in block.real:
            views[specs[p]["component"]].append(block.paths[p].slice)
    for k, head in model.heads.items():
        views[int(k)].append(head)
    names = {id(p): name for name, p in model.named_parameters()}
    private = sum(sizes[names[id(p)]] for m in model.modules() if isinstance(m, Projector) for p in m.parameters())
    mapped = download = 0
    for k, fact in enumerate(facts):
        fresh = not fact.tensors or fact.needs_conversion(dtype)
        seen: set[str] = set()
        counted: set[int] = set()
        for view in views[k]:
            base = f"{view.base_model_prefix}."
            for name, parameter in view.named_parameters():
                size = sizes.get(names.get(id(parameter), ""), 0)
                if id(parameter) in counted or not size:
                    continue
                counted.add(id(parameter))
                own = name.removeprefix(base)
                again, rows = own in seen, k in vocabulary.changed and _by_token(view, parameter)
                seen.add(own)
                private, mapped = (private + size, mapped) if fresh or again or rows else (private, mapped + size)
        if whole:
            download += fact.bytes_to_get(ComponentPart(frozenset(range(fact.config.num_hidden_layers)), True, True))
        elif k in config.used_components:
            download += fact.bytes_to_get(ComponentPart.of(config, k, heads=True))
    return Building(round(private + BUILDING_OVERHEAD), mapped, download)


def _by_token(view: Any, parameter: Any) -> bool:
    tables = (view.get_input_embeddings(), view.get_output_embeddings())
    return any(parameter is own for table in tables if table is not None for own in table.parameters())


def _bad_tensors(fact: ComponentFacts, config: ManticoreConfig) -> list[str]:
    """Layers that the hybrid uses and no file has; vocabulary matrices of another height than the configuration's."""
    if not fact.tensors:
        return []
    part = ComponentPart.of(config, fact.index, heads=True)
    problems = []
    stored = {int(word) for name in fact.tensors for word in name.split(".") if word.isdigit()}
    missing = sorted(part.layers - stored)
    if missing:
        problems.append(f"{fact.where}: its files have no tensors of the layers {missing[:5]}.")
    size = fact.config.vocab_size
    for name, (_, shape) in fact.tensors.items():
        heights = name.endswith(("embed_in.weight", "embed_tokens.weight", "wte.weight", "embeddings.weight"))
        if heights and "position" not in name and len(shape) == 2 and shape[0] != size:
            problems.append(f"{fact.where}: {name} has {shape[0]} rows, its configuration says vocab_size {size}.")
    return problems


def _missing_texts(recipe: Recipe) -> list[str]:
    problems = []
    for section in ("tokenizer", "calibration", "search", "finetune", "evaluation"):
        for name in ("texts", "score_texts", "search_texts", "train_texts"):
            for i, text in enumerate(getattr(getattr(recipe, section), name, None) or ()):
                if text not in BUILT_IN and not Path(text).exists():
                    problems.append(
                        f"{section}.{name}[{i}]: got {text!r}, but there is no such file or folder{hint(text)} Built "
                        f"in are {', '.join(BUILT_IN)}."
                    )
    return problems


def _local_sources(recipe: Recipe) -> list[str]:
    """What the push would refuse at the end: paths of this machine in the configuration or the recipe."""
    publishing = recipe.publishing
    if publishing is None or publishing.repo_id is None or publishing.allow_local_sources:
        return []
    folders = [(f"components[{k}].folder", part.folder) for k, part in enumerate(recipe.components) if part.folder]
    others = [(place.removeprefix("recipe."), path) for place, path in local_paths(recipe_to_dict(recipe), "recipe")]
    found = list(dict(folders + others).items())
    if not found:
        return []
    places = "; ".join(f"{place} is {path!r}" for place, path in found[:3])
    more = f" and {len(found) - 3} more" if len(found) > 3 else ""
    return [
        f"publishing.allow_local_sources: got false, but {places}{more}, which means nothing to others who find it in "
        f"{publishing.repo_id!r}. Name repositories, or set it to true (`manticore build --allow_local_sources`), and "
        "'local' is written instead."
    ]


def _too_long(recipe: Recipe, config: ManticoreConfig) -> list[str]:
    limit = config.max_position_embeddings
    problems = []
    for section in ("calibration", "search", "finetune", "evaluation"):
        own = getattr(recipe, section)
        length = 0 if getattr(own, "strategy", None) == "none" else getattr(own, "row_length", 0)
        if limit is not None and length > limit:
            problems.append(f"{section}.row_length: got {length}, allowed is at most {limit}, the hybrid's context.")
    return problems
