"""Tables of `two_domains.py` and `three_components.py`, all of it computed from the finished units."""

import math
from statistics import fmean

import numpy as np
from _domain_plan import Plan

from modeling_manticore.experiments.intervals import interval, sign_flip_p
from modeling_manticore.experiments.units import Ledger
from modeling_manticore.tasks.metrics import bits_per_byte


MIXTURE = "mixture"
CHOSEN = "Manticore, the search's choice"
MEASURES = ("bits_per_byte", "nats")
RESAMPLES = 2000


class Report:
    """
    Args:
        plan, ledger: what is compared, and what is finished. Seeds of which a unit is missing are left out.
    """

    def __init__(self, plan: Plan, ledger: Ledger):
        self.plan, self.ledger = plan, ledger
        texts = ledger.get(plan.texts())
        self.bytes = {} if texts is None else texts["test_bytes"]
        self.domains = [*plan.setting.domains, MIXTURE]
        self.runs = {pair: {} for pair in plan.pairs}
        for seed in plan.seeds:
            found = {pair: self._records(pair, seed) for pair in plan.pairs}
            if None not in found.values():
                for pair, records in found.items():
                    self.runs[pair][seed] = records
        self.seeds = list(next(iter(self.runs.values())))

    # ------------------------------------------------------------------ from records to numbers
    def _records(self, pair: str, seed: int) -> dict[str, dict] | None:
        """Row -> record of one pair and seed; None while one is missing."""
        plan, ledger = self.plan, self.ledger
        units = {
            f"{family} ({domain}) alone": plan.component(family, domain, seed) for family, domain in plan.pairs[pair]
        }
        units |= {model.name: plan.final(ledger, pair, model, seed) for model in plan.models(pair)}
        units["logit ensemble of the components"] = plan.ensemble(ledger, pair, seed, False)
        units["logit ensemble of the continued"] = plan.ensemble(ledger, pair, seed, True)
        units[CHOSEN] = plan.chosen(ledger, pair, seed)
        if seed in plan.from_scratch:
            for family in plan.families:
                units[f"{family} from scratch on everything"] = plan.same_parameters(ledger, family, seed)
        found = {name: None if unit is None else ledger.get(unit) for name, unit in units.items()}
        return None if None in found.values() else found

    def value(self, record: dict, domain: str, measure: str) -> float:
        """Bits per byte, or nats a token, of test documents; of the mixture the mean over domains."""
        if domain == MIXTURE:
            return fmean(self.value(record, own, measure) for own in self.plan.setting.domains)
        nats = record["nats"][domain]
        if any(value is None for value in nats):
            return math.inf  # it diverged
        if measure == "nats":
            return math.fsum(nats) / record["test_tokens"][domain]
        return bits_per_byte(nats, self.bytes[domain])

    def better(self, pair: str, seed: int, domain: str = MIXTURE) -> str:
        """
        The continued component that is better on search rows of all domains; of a domain, of those that were trained
        on it. The test text does not choose.
        """
        records = self.runs[pair][seed]
        models = [model for model in self.plan.models(pair) if model.kind == "continued"]
        names = [model.name for model in models if domain in (MIXTURE, model.components[0][1])]
        return min(names, key=lambda name: records[name]["search"])

    def differences(self, name: str, domain: str, measure: str, pair: str | None = None) -> list[float]:
        """
        A row minus the component that is better in the domain (`better`), seed by seed; without a pair the mean over
        pairs of every seed.
        """
        if pair is None:
            return [fmean(values) for values in zip(*(self.differences(name, domain, measure, p) for p in self.runs))]
        found = []
        for seed, records in self.runs[pair].items():
            if name in records:
                rival = self.value(records[self.better(pair, seed, domain)], domain, measure)
                found.append(self.value(records[name], domain, measure) - rival)
        return found

    def bootstrap(self, name: str, pair: str, seed: int) -> dict[str, float]:
        """The 95 % interval over test documents of the difference in bits per byte of the mixture, in one run."""
        draws = np.random.default_rng(0)
        records = self.runs[pair][seed]
        first, second = records[name], records[self.better(pair, seed)]
        total = np.zeros(RESAMPLES)
        for domain, sizes in self.bytes.items():
            sizes = np.asarray(sizes, dtype=float)
            nats = np.asarray(first["nats"][domain], dtype=float) - np.asarray(second["nats"][domain], dtype=float)
            picked = draws.integers(len(sizes), size=(RESAMPLES, len(sizes)))
            total += nats[picked].sum(axis=1) / sizes[picked].sum(axis=1) / math.log(2) / len(self.bytes)
        low, high = np.quantile(total, [0.025, 0.975])
        return {"seed": seed, "low": float(low), "high": float(high)}

    # ------------------------------------------------------------------ the whole
    def results(self) -> dict:
        """Plain values for the JSON file."""
        if not self.seeds:
            return {"seeds": 0}
        names = {pair: list(next(iter(runs.values()))) for pair, runs in self.runs.items()}
        everywhere = [name for name in names[next(iter(names))] if all(name in own for own in names.values())]
        return {
            "seeds": len(self.seeds),
            "component_minutes": self._component_minutes(),
            "component_parameters": {
                f"{family} ({domain})": self._component(family, domain, self.seeds[0])["parameters"]
                for pair in self.plan.pairs.values()
                for family, domain in pair
            },
            "largest_parameter_ratio": self._largest_ratio(),
            "difference": {
                "all pairs": {name: self._row(name, None) for name in everywhere},
                **{pair: {name: self._row(name, pair) for name in own} for pair, own in names.items()},
            },
            "table": {pair: {name: self._absolute(name, pair) for name in own} for pair, own in names.items()},
            "better_component": {
                pair: {seed: self.better(pair, seed) for seed in self.seeds} for pair in self.plan.pairs
            },
            "bootstrap_over_documents": {
                pair: [self.bootstrap(CHOSEN, pair, seed) for seed in self.seeds] for pair in self.plan.pairs
            },
            "searches": {pair: {seed: self._search(pair, seed) for seed in self.seeds} for pair in self.plan.pairs},
            "rates": {
                pair: {model.name: self.plan.rate(self.ledger, pair, model) for model in self.plan.models(pair)}
                for pair in self.plan.pairs
            },
        }

    def _row(self, name: str, pair: str | None) -> dict:
        return {
            domain: {measure: described(self.differences(name, domain, measure, pair)) for measure in MEASURES}
            for domain in self.domains
        }

    def _absolute(self, name: str, pair: str) -> dict:
        records = [found[name] for found in self.runs[pair].values() if name in found]
        row = {
            domain: {measure: described([self.value(r, domain, measure) for r in records]) for measure in MEASURES}
            for domain in self.domains
        }
        return row | {"parameters": fmean(record["parameters"] for record in records)}

    def _search(self, pair: str, seed: int) -> dict:
        found = self.ledger.get(self.plan.search(pair, seed))
        return {key: found[key] for key in ("choice", "candidates", "tried", "method", "spent", "search_seconds")}

    def _component(self, family: str, domain: str, seed: int) -> dict:
        return self.ledger.get(self.plan.component(family, domain, seed))

    def _component_minutes(self) -> dict:
        found = [
            self._component(family, domain, seed)["training_seconds"] / 60
            for seed in self.seeds
            for pair in self.plan.pairs.values()
            for family, domain in pair
        ]
        return {"least": min(found), "mean": fmean(found), "most": max(found)}

    def _largest_ratio(self) -> float:
        """Over all hybrids and their components: how far the ratio of parameters is from 1."""
        ratios = [
            abs(records[CHOSEN]["parameters"] / records[f"{family} ({domain}) alone"]["parameters"] - 1)
            for pair, runs in self.runs.items()
            for records in runs.values()
            for family, domain in self.plan.pairs[pair]
        ]
        return max(ratios)

    def __str__(self) -> str:
        found = self.results()
        lines = [f"{found['seeds']} of {len(self.plan.seeds)} seeds are finished"]
        if not self.seeds:
            return lines[0]
        for pair, rows in found["table"].items():
            lines.append(f"\n{pair}: bits per byte, and minus the better component on the mixture")
            lines.append(f"{'':<40}" + "".join(f"{domain:>18}" for domain in self.domains) + f"{'difference':>20}")
            for name, row in rows.items():
                cells = [shown(row[domain]["bits_per_byte"]) for domain in self.domains]
                less = shown(found["difference"][pair][name][MIXTURE]["bits_per_byte"])
                lines.append(f"{name:<40}" + "".join(f"{cell:>18}" for cell in cells) + f"{less:>20}")
            grid = self.plan.setting.rates
            edge = [name for name, rate in found["rates"][pair].items() if rate in (min(grid), max(grid))]
            lines.append(f"learning rate at the end of the grid, so that a wider one might be better: {edge}")
            choices = {seed: "".join(map(str, own["choice"])) for seed, own in found["searches"][pair].items()}
            lines.append(f"choices by seed: {choices}; better component: {found['better_component'][pair]}")
        return "\n".join(lines)


def described(values: list[float]) -> dict:
    """Mean and 95 % t-interval over seeds, its ends, the values, and the sign-flip p where there are 6 or more."""
    found = interval(values)
    ends = {} if found.half_width is None else {"low": found.low, "high": found.high}
    row = {"mean": found.mean, "half_width": found.half_width, **ends, "values": values}
    p = sign_flip_p(values) if len(values) <= 16 else None
    return row if p is None else row | {"sign_flip_p": p}


def shown(row: dict) -> str:
    """`mean +- half width`."""
    return f"{row['mean']:.3f}" + ("" if row["half_width"] is None else f" +- {row['half_width']:.3f}")
