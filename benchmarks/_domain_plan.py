"""
What `two_domains.py` and `three_components.py` compare: the units of work, their sizes, and the learning rates, which
are chosen on the first seed.
"""

from dataclasses import dataclass, field
from functools import cache

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from modeling_manticore.building.costs import count
from modeling_manticore.experiments.architectures import Sizes, component_config, sized_component
from modeling_manticore.experiments.schema import Shape
from modeling_manticore.experiments.units import Ledger, Unit


Component = tuple[str, str]  # family, domain
SCORING = 33_000  # tokens of training that take as long as scoring the test documents


@dataclass(frozen=True)
class Setting:
    """
    Sizes and budgets. Tokens of a component are by family, so that each trains for about `component_minutes` on one
    thread; all models get the same `extra_tokens` afterwards, in which a hybrid pays for calibration and search.
    `speeds` are training tokens a second of one thread, for the estimate alone.
    """

    domains: dict[str, list[str]] = field(
        default_factory=lambda: {"prose": ["bible", "shakespeare"], "code": ["python"]}
    )
    characters: int = 10_000_000
    vocabulary: int = 2048
    length: int = 128
    test_documents: int = 64
    document_characters: int = 1500
    width: int = 96
    layers: int = 6
    state_size: int = 64
    component_tokens: dict[str, int] = field(default_factory=dict)
    component_rate: float = 4e-3
    component_rows: int = 16
    extra_tokens: int = 131_072
    extra_rows: int = 8
    rates: tuple[float, ...] = (5e-4, 1.5e-3, 4.5e-3, 1.35e-2)
    calibration_rows: int = 32
    scored_rows: int = 16
    search_rows: int = 64
    halving_share: float = 0.05
    halved: int = 2
    beam: int = 4
    limit: int = 64
    shown: int = 8
    speeds: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Model:
    """
    A row of the tables, trained with the extra tokens.

    Attributes:
        name: in tables.
        kind: the unit's; `settings` are its own.
        components: whose files it needs, in this order.
        cost: training time of a token, in units of a component's.
        searched: needs the search's result, whose tokens are paid from its own.
    """

    name: str
    kind: str
    settings: dict = field(default_factory=dict, hash=False)
    components: tuple[Component, ...] = ()
    cost: float = 1.0
    searched: bool = False


class Plan:
    """
    The units of one comparison.

    Args:
        pairs: name -> components that are joined, (family, domain) each.
        blocks: of the supernet.
        drops: whether layer dropping is compared.
        orders: whether both orders of the halves are trained, beside what the search chose.
        from_scratch_seeds: on how many of the seeds components of the hybrid's parameters are trained on everything.
    """

    def __init__(
        self,
        setting: Setting,
        pairs: dict[str, tuple[Component, ...]],
        seeds: list[int],
        blocks: int = 2,
        drops: bool = True,
        orders: bool = True,
        from_scratch_seeds: int = 0,
    ):
        self.setting, self.pairs, self.seeds, self.blocks = setting, pairs, seeds, blocks
        self.drops, self.orders = drops, orders
        self.from_scratch = seeds[:from_scratch_seeds]
        self.families = list(dict.fromkeys(family for own in pairs.values() for family, _ in own))

    # ------------------------------------------------------------------ units
    def __call__(self, ledger: Ledger) -> list[Unit]:
        """All that is known by now, seed after seed."""
        return [unit for seed in self.seeds for pair in self.pairs for unit in self.of(ledger, pair, seed)]

    def of(self, ledger: Ledger, pair: str, seed: int) -> list[Unit]:
        """The units of one pair and seed, without those that wait for a result."""
        own = self.pairs[pair]
        units = [self.texts(), *(self.component(*one, seed) for one in own), self.search(pair, seed)]
        for model in self.models(pair):
            rates = self.setting.rates if seed == self.seeds[0] else [self.rate(ledger, pair, model)]
            units += [self.trained(ledger, pair, model, rate, seed) for rate in rates]
        units += [self.ensemble(ledger, pair, seed, continued) for continued in (False, True)]
        if seed in self.from_scratch:
            units += [self.same_parameters(ledger, family, seed) for family in self.families]
        return [unit for unit in units if unit is not None]

    def models(self, pair: str) -> list[Model]:
        """The rows of the tables that are trained with the extra tokens, the search's choice first."""
        own = self.pairs[pair]
        rows = [
            Model(f"{family} ({domain}) continued", "continued", {}, ((family, domain),)) for family, domain in own
        ]
        if self.orders:
            for choice in _orders(len(own), self.blocks):
                words = " -> ".join(own[k][1] for k in dict.fromkeys(choice))
                rows.append(Model(f"hybrid, {words}", "hybrid", {"choice": list(choice)}, own, searched=True))
        else:
            rows.append(Model("hybrid", "hybrid", {}, own, searched=True))
        if self.drops:
            for family, domain in own:
                name = f"{family} ({domain}), lower half alone"
                rows.append(Model(name, "dropped", {"kept": "lower"}, ((family, domain),), cost=0.6))
        rows += [
            Model(f"{weights} mixture", "mixture", {"weights": weights}, own, cost=1.1 * len(own))
            for weights in ("uniform", "random")
        ]
        return rows

    def texts(self) -> Unit:
        names = ("domains", "characters", "vocabulary", "length", "test_documents", "document_characters")
        settings = {name: getattr(self.setting, name) for name in names}
        return Unit("texts", settings, label="texts", estimate=120, leaves_files=True, must_repeat=True)

    def component(self, family: str, domain: str, seed: int) -> Unit:
        """Trained on one domain."""
        setting = self.setting
        settings = self._training(
            setting.component_tokens[family], setting.component_rate, setting.component_rows, seed
        )
        settings |= {"domain": domain, "config": config_of(family, setting)}
        return self._unit("component", settings, {"texts": self.texts()}, f"component {family}", [family], leaves=True)

    def search(self, pair: str, seed: int) -> Unit:
        setting = self.setting
        settings = self._training(
            setting.extra_tokens, setting.rates[(len(setting.rates) - 1) // 2], setting.extra_rows, seed
        )
        names = ("calibration_rows", "scored_rows", "halving_share", "halved", "beam", "limit", "shown")
        settings |= {name: getattr(setting, name) for name in names}
        settings["blocks"] = self.blocks
        return self._unit("search", settings, self._needs(pair, seed), "search", self._families(pair), cost=0.6)

    def trained(self, ledger: Ledger, pair: str, model: Model, rate: float | None, seed: int) -> Unit | None:
        """A model's unit; None while the rate, or what the search says, is unknown."""
        setting = self.setting
        if rate is None:
            return None
        settings = self._training(setting.extra_tokens, rate, setting.extra_rows, seed) | model.settings
        if model.searched:
            found = ledger.get(self.search(pair, seed))
            if found is None:
                return None
            settings["tokens"] -= sum(found["spent"].values())
            if settings["tokens"] <= 0:
                raise ValueError(f"extra_tokens: got {setting.extra_tokens}, the search alone takes {found['spent']}.")
            settings.setdefault("choice", found["choice"])
        if model.kind in ("hybrid", "mixture"):
            settings |= {"blocks": self.blocks, "calibration_rows": setting.calibration_rows}
            needs = self._needs(pair, seed)
        else:
            needs = {"texts": self.texts(), "component": self.component(*model.components[0], seed)}
        families = [family for family, _ in model.components]
        label = f"{model.kind} {len(families)}" if len(families) > 1 else f"{model.kind} {families[0]}"
        return self._unit(model.kind, settings, needs, label, families, model.cost, leaves=model.kind == "continued")

    def ensemble(self, ledger: Ledger, pair: str, seed: int, continued: bool) -> Unit | None:
        """Of the components as they are, or after each has had all extra tokens."""
        needs = self._needs(pair, seed)
        if continued:
            rows = [model for model in self.models(pair) if model.kind == "continued"]
            made = [self.trained(ledger, pair, row, self.rate(ledger, pair, row), seed) for row in rows]
            if None in made:
                return None
            needs = {"texts": self.texts()} | {str(k): unit for k, unit in enumerate(made)}
        settings = {"length": self.setting.length}
        return Unit("ensemble", settings, needs, "ensemble", 10.0)

    def same_parameters(self, ledger: Ledger, family: str, seed: int) -> Unit | None:
        """Trained from scratch on everything, sized to the hybrid that the search chose first."""
        setting, chosen = self.setting, self.chosen(ledger, next(iter(self.pairs)), self.seeds[0])
        if chosen is None or ledger.get(chosen) is None:
            return None
        tokens = setting.component_tokens[family] + setting.extra_tokens
        settings = self._training(tokens, setting.component_rate, setting.component_rows, seed)
        parameters = ledger.get(chosen)["parameters"]
        settings |= {"domain": None, "config": config_of(family, setting, parameters)}
        return self._unit("component", settings, {"texts": self.texts()}, f"component {family}", [family], leaves=True)

    # ------------------------------------------------------------------ what follows from results
    def rate(self, ledger: Ledger, pair: str, model: Model) -> float | None:
        """The learning rate with the lowest loss on search rows, on the first seed; None while some are missing."""
        first, losses = self.seeds[0], {}
        for rate in self.setting.rates:
            unit = self.trained(ledger, pair, model, rate, first)
            record = None if unit is None else ledger.get(unit)
            if record is None:
                return None
            losses[rate] = float("inf") if record["search"] is None else record["search"]
        return min(losses, key=losses.get)

    def final(self, ledger: Ledger, pair: str, model: Model, seed: int) -> Unit | None:
        """The unit of a model at its chosen rate."""
        return self.trained(ledger, pair, model, self.rate(ledger, pair, model), seed)

    def chosen(self, ledger: Ledger, pair: str, seed: int) -> Unit | None:
        """The unit of the hybrid that the search chose."""
        found = ledger.get(self.search(pair, seed))
        if found is None:
            return None
        for model in self.models(pair):
            if model.searched and model.settings.get("choice", found["choice"]) == found["choice"]:
                return self.final(ledger, pair, model, seed)
        raise ValueError(f"search: it chose {found['choice']}, which is none of the hybrids that are compared.")

    def estimate(self, ledger: Ledger) -> dict[str, list[float]]:
        """Of every label: units, finished units, hours of the units that are left (known by now or not)."""
        found: dict[str, list[float]] = {}
        seen = set()
        guess = _Guess(ledger, self)
        for unit in self(guess):
            if unit.digest in seen:
                continue
            seen.add(unit.digest)
            row = found.setdefault(unit.label, [0, 0, 0.0])
            row[0] += 1
            if guess.is_finished(unit):
                row[1] += 1
            else:
                row[2] += ledger.seconds(unit) / 3600
        return found

    # ------------------------------------------------------------------ parts
    def _training(self, tokens: int, rate: float, rows: int, seed: int) -> dict:
        shared = {"length": self.setting.length, "search_rows": self.setting.search_rows}
        return shared | {"tokens": tokens, "rate": rate, "rows_per_step": rows, "seed": seed}

    def _needs(self, pair: str, seed: int) -> dict[str, Unit]:
        own = {str(k): self.component(*one, seed) for k, one in enumerate(self.pairs[pair])}
        return {"texts": self.texts()} | own

    def _families(self, pair: str) -> list[str]:
        return [family for family, _ in self.pairs[pair]]

    def _unit(self, kind, settings, needs, label, families, cost=1.0, leaves=False) -> Unit:
        speed = sum(self.setting.speeds.get(family, 5000) for family in families) / len(families)
        seconds = cost * (settings["tokens"] + SCORING) / speed
        return Unit(kind, settings, needs, label, seconds, leaves_files=leaves)


class _Guess:
    """A ledger in which everything is finished, for counting what will have to be done."""

    def __init__(self, ledger: Ledger, plan: Plan):
        self.ledger, self.plan = ledger, plan
        components = max(len(own) for own in plan.pairs.values())
        parameters = count_of(plan.families[0], plan.setting)
        choice = list(_orders(components, plan.blocks)[0])
        self.guessed = {"search": 0.0, "spent": {}, "choice": choice, "parameters": parameters}

    def get(self, unit: Unit) -> dict:
        return self.ledger.get(unit) or self.guessed

    def is_finished(self, unit: Unit) -> bool:
        return self.ledger.get(unit) is not None


def _orders(components: int, blocks: int) -> list[tuple[int, ...]]:
    """Every component once, in as equal parts as there are: for two components and two blocks (0, 1) and (1, 0)."""
    order = [k * components // blocks for k in range(blocks)]
    return [tuple(order), tuple(components - 1 - k for k in order)]


def config_of(family: str, setting: Setting, parameters: int | None = None) -> dict:
    """
    The configuration of a component as plain values. Attention families have the inner width at which they have as
    many parameters as Mamba-2 (or the number given).
    """
    return dict(
        _config(
            family, setting.width, setting.layers, setting.state_size, setting.vocabulary, setting.length, parameters
        )
    )


def count_of(family: str, setting: Setting) -> int:
    """Parameters of a component."""
    return _count(_made(config_of(family, setting)))


@cache
def _config(family, width, layers, state_size, vocabulary, length, parameters) -> dict:
    shape = Shape(hidden_size=width, layers=layers, head_size=32 if width % 32 == 0 else 16, state_size=state_size)
    sizes = Sizes(vocabulary, length)
    reference = component_config("mamba2", shape, sizes)
    wanted = _count(reference) if parameters is None else parameters
    if family == "mamba2" and parameters is None:
        config = reference
    else:
        config = sized_component(family, shape, sizes, wanted, layers, _count)
    values = config.to_diff_dict()
    return {key: value for key, value in values.items() if key != "transformers_version"}


def _made(values: dict) -> PreTrainedConfig:
    from transformers import AutoConfig

    return AutoConfig.for_model(**values)


def _count(config: PreTrainedConfig) -> int:
    with torch.device("meta"):
        return count(AutoModelForCausalLM.from_config(config))
