"""The rows of README.md's table of results, out of the JSON that the benchmark scripts wrote."""

import json
import statistics
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SEARCHED, ENSEMBLE = "Manticore, the search's choice", "logit ensemble of the continued"
MIXED = "uniform mixture"


def result(name: str) -> dict[str, Any]:
    """
    What `benchmarks/NAME.py` wrote.

    Raises:
        ValueError: there is no such file.
    """
    file = RESULTS / f"{name}.json"
    if not file.is_file():
        raise ValueError(f"{file.relative_to(ROOT)}: there is no such file, python benchmarks/{name}.py writes it.")
    return json.loads(file.read_text(encoding="utf-8"))


def known_families() -> list[str]:
    """The model types of the families that were compared cell by cell; variants of one count once."""
    from transformers import CONFIG_MAPPING

    return [name for name in result("families")["families"] if name in CONFIG_MAPPING]


def figure(summary: dict[str, Any]) -> str:
    """`mean ± half width of the 95 % interval`, three digits."""
    half = summary["half_width"]
    return f"{summary['mean']:.3f}" + ("" if half is None else f" ± {half:.3f}")


def span(values: list[float]) -> str:
    """The least and the largest of the values, two digits."""
    return f"{min(values):.2f} to {max(values):.2f}"


def families_row() -> tuple[str, str]:
    """Equality with the uncut model."""
    found = result("families")
    return (
        "families that equal the uncut model: logits, gradients, padding, decoding, beams, saving",
        f"{len(known_families())} (largest difference {found['largest']:.1g}, {found['bound']:.0e} allowed)",
    )


def corners_row() -> tuple[str, str]:
    """Pure corners of the supernet."""
    found = result("corners")
    largest, scan = max(row["pure"] for row in found["rows"]), found["scan"]
    told = "yes, bit for bit" if largest == 0 else f"within {largest:.1g}"
    if scan:
        told += f" with our Mamba in both ({scan:.1g} from transformers' own)"
    return "a supernet whose weights all name one component is that component", told


def bridges_row() -> tuple[str, str]:
    """Bridges in closed form between two models of one text."""
    found = [
        row["behind_better_component"]["mean"]
        for row in result("same_text")["summary"].values()
        if "behind_better_component" in row
    ]
    return (
        "two models of one text, two to six slices, bridges in closed form, no gradient step",
        f"{span(found)} nats behind the better one",
    )


def mixing_row() -> tuple[str, str]:
    """The mixture landscape with one block."""
    table = result("landscape")["table"]
    ours, papers = (table[f"{gate}, 1"]["gain of mixing"] for gate in ("routed", "mixture"))
    return (
        "a mixture of two pretrained models is better than either, one block, frozen",
        f"our gate: by {figure(ours)} nats; the paper's gate: by {figure(papers)}",
    )


def distillation_row() -> tuple[str, str]:
    """Half the key-value cache."""
    found = result("distillation")
    loss = {name: found["summary"][name]["loss"]["mean"] for name in ("teacher", "labels", "distilled w=1")}
    costs = found["cache_bytes_per_token"]
    share = costs["hybrid"] / costs["teacher"]
    return (
        f"a hybrid with {share:.0%} of a GPT-NeoX's key-value cache, whose loss is {loss['teacher']:.3f} nats",
        f"{loss['labels']:.3f} trained on labels, {loss['distilled w=1']:.3f} distilled",
    )


def search_row() -> tuple[str, str]:
    """The training-free search."""
    rows = [run["rows"]["stitch"] for run in result("regret")["runs"]]
    found = [row["choice"] for row in rows if row["rank"] == 1]
    pure = sum(len(set(choice)) == 1 for choice in found)
    return (
        "the search without training (`stitch`) finds the best of 8 fine-tuned hybrids",
        f"in {len(found)} of {len(rows)} runs; in {pure} of them that is one component alone",
    )


def programming_row() -> tuple[str, str]:
    """Programming on MAD tasks against a random choice."""
    best = min(result("programming")["regret_minus_random"].values(), key=lambda row: row["mean"])
    beaten = "yes" if best["mean"] + best["half_width"] < 0 else "no"
    return (
        "programming on MAD tasks finds a better hybrid than a random choice",
        f"{beaten}: the best of its variants is {figure(best)} nats worse"
        if beaten == "no"
        else f"yes: by {figure({**best, 'mean': -best['mean']})} nats",
    )


def recall_row() -> tuple[str, str]:
    """Recall beyond the training length, at half the key-value cache."""
    file = RESULTS / "e8_long_recall.jsonl"
    runs = [
        run for line in file.read_text(encoding="utf-8").splitlines() if (run := json.loads(line))["phase"] == "final"
    ]
    told, costs = {}, {}
    for model in ("Transformer", "Manticore, half the KV bytes"):
        own = [run for run in runs if run["model"] == model]
        shares = [
            [run["test"]["accuracy"], *(test["accuracy"] for test in run["also_tested"].values())] for run in own
        ]
        told[model] = ", ".join(f"{100 * statistics.fmean(values):.1f}" for values in zip(*shares, strict=True))
        costs[model] = own[0]["cache_bytes_per_token"]
    theirs, ours = told
    return (
        f"recall at 1, 2 and 4 times the training length: a searched hybrid with {costs[ours] / costs[theirs]:.0%} of "
        "the cache, from scratch",
        f"{told[ours]} % right; the {theirs} {told[theirs]} %",
    )


def three_components_row() -> tuple[str, str]:
    """A hybrid of three families against the best of them, all with the same further tokens."""
    rows = result("three_components")["difference"]["all pairs"]
    told = {name: rows[name]["mixture"]["bits_per_byte"] for name in (SEARCHED, ENSEMBLE)}
    return (
        "the same of three components in six blocks",
        f"{figure(told[SEARCHED])}; the mean of all three components' probabilities {figure(told[ENSEMBLE])}",
    )


def two_domains_row() -> tuple[str, str]:
    """A hybrid of two components' halves against the better of them, all with the same further tokens."""
    rows = result("two_domains")["difference"]["all pairs"]
    told = {name: rows[name]["mixture"]["bits_per_byte"] for name in (SEARCHED, MIXED)}
    return (
        "half a prose and half a code component against the better of both continued, equal tokens: bits per byte on "
        "both (below 0 is better)",
        f"{figure(told[SEARCHED])}; both whole, mixed equally, {figure(told[MIXED])}",
    )


def real_weights_row() -> tuple[str, str]:
    """Attention layers of a published model replaced by Mamba-2."""
    found = result("real_weights_full")
    shares = [found["table"][layers]["share"]["after"]["mamba2"]["all"] for layers in ("15", "10+15+20")]
    fit, train = (found["settings"][name] for name in ("fit_tokens", "train_tokens"))
    return (
        "SmolLM2-135M with Mamba-2 for attention in 1 and in 3 of 30 layers: share that is closed of the gap between "
        f"dropping these layers and keeping them ({fit:,} tokens to fit a layer, then {train:,} end to end)",
        " and ".join(figure(share) for share in shares),
    )


def speed_row() -> tuple[str, str]:
    """Passes, decoding and loading, against native models of the same layers."""
    rows = [row for found in result("speed")["shapes"]["small"].values() for row in found["rows"] if "bound" in row]
    told = []
    for name, start in (("passes", "forward"), ("decoding", "decode,"), ("loading in a new process", "first load")):
        told.append(f"{name} {span([row['ratio'] for row in rows if row['name'].startswith(start)])}")
    return (
        "time of one, two and twelve slices over native models of the same layers (width 192, one thread)",
        "; ".join(told),
    )


def suite_row() -> tuple[str, str]:
    """transformers' own tests."""
    found = {name: row for name, row in result("common_suite")["subjects"].items() if "+" in name or ">" in name}
    passed, failed = (sum(row[key] for row in found.values()) for key in ("passed", "failed"))
    return f"`transformers`' own model tests on {len(found)} hybrids", f"{passed} passed, {failed} failed"


ROWS = {
    "families": families_row,
    "corners": corners_row,
    "same_text": bridges_row,
    "landscape": mixing_row,
    "distillation": distillation_row,
    "regret": search_row,
    "programming": programming_row,
    "experiments/e8_long_recall": recall_row,
    "two_domains": two_domains_row,
    "three_components": three_components_row,
    "real_weights": real_weights_row,
    "speed": speed_row,
    "common_suite": suite_row,
}  # by the benchmark script that measured them


def results_table() -> str:
    """The table of results, in Markdown."""
    lines = ["| what | result | measured by |", "|---|---|---|"]
    for script, row in ROWS.items():
        what, told = row()
        ending = "yaml" if script.startswith("experiments/") else "py"
        lines.append(f"| {what} | {told} | `benchmarks/{script}.{ending}` |")
    return "\n".join(lines)
