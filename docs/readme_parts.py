"""The other parts of README.md that are written by script: components, libraries, extras, commands, claims."""

import re
from collections import Counter
from typing import Any

from readme_results import ROOT, known_families, result, results_table


# Library, what was run, how it came out, and the test functions in tests/test_ecosystem_*.py that say so.
WORKS: tuple[tuple[str, str, str, tuple[str, ...]], ...] = (
    (
        "transformers",
        "`pipeline`, `generate`, streaming, `AutoModelFor…Classification`",
        "equal to plain forward passes",
        (
            "test_text_generation",
            "test_text_classification",
            "test_the_streamer_gives_the_text_piece_by_piece",
            "test_the_last_real_token_is_scored",
            "test_every_token_is_scored",
        ),
    ),
    (
        "transformers",
        "stock `Trainer`: bf16, checkpointing, accumulation, smoothing, `torch_compile`, resuming",
        "equal to the plain run",
        (
            "test_bfloat16_autocast",
            "test_gradient_checkpointing_changes_nothing",
            "test_accumulated_gradients_equal_one_large_batch",
            "test_label_smoothing_is_that_of_shifted_labels",
            "test_compiled_training_is_training",
            "test_resuming_is_exact",
        ),
    ),
    (
        "transformers",
        "`resize_token_embeddings`",
        "old logits stay",
        ("test_larger", "test_smaller", "test_new_tokens_train"),
    ),
    ("datasets", "streamed training data", "equal to data in memory", ("test_streamed_data",)),
    (
        "peft",
        "adapters: train, save, load, merge",
        "what is saved is what was trained",
        ("test_what_is_saved_is_what_is_trained", "test_adapters_go_on_every_projection_that_is_called"),
    ),
    (
        "trl",
        "`SFTTrainer`; `ManticoreSFTTrainer` for supernets and scaled heads",
        "the hybrid's own loss, or an error",
        ("test_supervised_finetuning", "test_stock_trainer_is_refused_where_its_loss_would_be_wrong"),
    ),
    (
        "lm_eval",
        "choices, rolling likelihood, generation",
        "equal to scores by hand",
        ("test_scores", "test_the_command_without_the_package"),
    ),
    (
        "accelerate",
        "`accelerate launch`: two processes, DDP and FSDP2",
        "equal to one process",
        ("test_two_processes_equal_one", "test_fsdp_checkpoints_resume", "test_the_stock_trainer_trains_mixtures_too"),
    ),
    (
        "accelerate",
        "`device_map`, offloading to CPU and disk",
        "equal logits, blocks stay whole",
        ("test_blocks_on_disk", "test_accelerate_offload", "test_maps_do_not_split_blocks"),
    ),
    (
        "torch",
        "`torch.compile`, `torch.export`",
        "no graph break; equal logits",
        ("test_compiled_by_dynamo", "test_compiled_by_inductor", "test_exported"),
    ),
    (
        "torchao",
        "weight-only int8",
        "logits close, saved and loaded",
        ("test_torchao_in_place", "test_transformers_quantizes_while_loading"),
    ),
)
EXTRAS = {
    "cuda": "Mamba layers fast on a GPU",
    "train": "training, searching, pictures, adapters",
    "eval": "our metrics in `evaluate`, data sets",
    "ecosystem": "the libraries below that a hybrid runs in",
    "space": "to run a Space on your own machine",
    "docs": "`make docs`",
    "bench": "what some benchmarks compare with",
    "dev": "`make test`",
}  # what each extra of pyproject.toml is for


def components() -> str:
    """Which families can be a component."""
    known, others = known_families(), result("other_families")["right"]
    listed = ", ".join(known)
    return (
        f"Components of {len(known)} families are tested cell by cell against the uncut models ([table]"
        f"(docs/families.md)): {listed}. {len(others)} more passed a comparison of logits. What cannot be cut is "
        "refused by name, with the reason."
    )


def versions() -> dict[str, str]:
    """The tested version of every library: what the benchmark ran with, else the project's pins."""
    pins = re.findall(r"^([\w-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)
    found = {name.replace("-", "_"): number for name, number in pins}
    for row in result("ecosystem")["rows"]:
        name, number = row["library"].split()
        found[name.replace("-", "_")] = number.split("+")[0]
    return found


def tests_of_libraries() -> set[str]:
    """The names of the test functions in tests/test_ecosystem_*.py."""
    files = sorted((ROOT / "tests").glob("test_ecosystem_*.py"))
    return {name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(encoding="utf-8"), re.M)}


def works_table() -> str:
    """
    The table of what works with what.

    Raises:
        ValueError: a row names a test that is not there, or that did not pass when the benchmark ran it.
    """
    there, outcomes = tests_of_libraries(), {}
    for row in result("ecosystem")["rows"]:
        outcomes.setdefault(row["item"].partition("[")[0], set()).add(row["status"])
    lines = ["| library | version | what was run | how it came out |", "|---|---|---|---|"]
    for library, what, told, tests in WORKS:
        for test in tests:
            if test not in there:
                raise ValueError(f"WORKS: got {test!r}, allowed are the tests in tests/test_ecosystem_*.py.")
            if outcomes.get(test, {"passed"}) != {"passed"}:
                raise ValueError(f"WORKS: {test} did not pass in benchmarks/results/ecosystem.json.")
        lines.append(f"| {library.replace('_', '-')} | {versions()[library]} | {what} | {told} |")
    return "\n".join(lines)


def extras() -> dict[str, list[str]]:
    """
    The extras of pyproject.toml, with the names of their packages.

    Raises:
        ValueError: one has no purpose in `EXTRAS`, or the other way round.
    """
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    section = re.search(r"^\[project.optional-dependencies\]\n(.*?)^\[", text, re.MULTILINE | re.DOTALL)[1]
    found = {}
    for name, listed in re.findall(r"^(\w+) = \[(.*?)\]$", section, re.MULTILINE | re.DOTALL):
        found[name] = re.findall(r'"([\w.-]+(?:\[[\w,]+\])?)', listed)
    if set(found) != set(EXTRAS):
        raise ValueError(f"EXTRAS: got {sorted(EXTRAS)}, allowed are the extras of pyproject.toml, {sorted(found)}.")
    return found


def extras_table() -> str:
    """The table of extras."""
    lines = ["| extra | for | packages |", "|---|---|---|"]
    lines += [f"| `{name}` | {EXTRAS[name]} | {', '.join(packages)} |" for name, packages in extras().items()]
    return "\n".join(lines)


def command_table() -> str:
    """The table of sub-commands."""
    from modeling_manticore.commands import COMMANDS, POSITIONAL

    lines = ["| command | what it does |", "|---|---|"]
    for name, text in COMMANDS.items():
        lines.append(f"| `{' '.join(['manticore', name, *POSITIONAL.get(name, '').split()])}` | {text} |")
    return "\n".join(lines)


def recipes() -> str:
    """How many recipes come along, and which."""
    files = sorted((ROOT / "hub_configs").glob("*.yaml"))
    named = ", ".join(f"`{file.stem}`" for file in files)
    return f"{len(files)} recipes come along: {named}."


def claims() -> str:
    """
    How many claims of RESULTS.md hold.

    Raises:
        ValueError: a verdict that the report does not have.
    """
    first = (ROOT / "RESULTS.md").read_text(encoding="utf-8").split("\n## ")[0]
    rows: list[Any] = [line.strip("|").split("|") for line in first.splitlines() if line.startswith("| ")][2:]
    counts = Counter(row[-1].strip() for row in rows)
    words = {"yes": "they hold", "not refuted": "not refuted", "no": "they do not", "not decided": "not decided"}
    if not rows or set(counts) - set(words):
        raise ValueError(f"RESULTS.md: got the verdicts {sorted(counts)}, allowed are {', '.join(words)}.")
    told = ", ".join(f"{text}: {counts[word]}" for word, text in words.items())
    return f"[RESULTS.md](RESULTS.md) has {len(rows)} claims, the paper's and ours, and what our data say; {told}."


PARTS = {
    "components": components,
    "works": works_table,
    "extras": extras_table,
    "commands": command_table,
    "recipes": recipes,
    "results": results_table,
    "claims": claims,
}
