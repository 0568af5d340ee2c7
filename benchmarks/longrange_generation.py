"""
The generators of Long Range Arena's ListOps and Pathfinder: seconds for the whole ListOps set (three splits, no row
twice, on the disk) and again from the cache, beside plain Python that draws trees node by node; label shares of both;
rows that other means than the generators solve (a parser of the text; a tracer of the paths); what trivial statistics
tell of Pathfinder's labels (a threshold is chosen on half of the rows and counted on the other half), and what linking
lit pixels does that are at most three apart, without a look at where curves head.
"""

import argparse
import random
import sys
import tempfile
import time
from math import sqrt
from pathlib import Path

import numpy as np
from _shared import quiet, versions, write
from datasets import disable_progress_bars
from tqdm.auto import tqdm

from modeling_manticore.tasks.listops import ListOpsSetting, listops, listops_text
from modeling_manticore.tasks.pathfinder import PathfinderSetting, make_pathfinder, pathfinder


sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from long_range import best_threshold, light_between, listops_row, markers, parse, trace, trivial_statistics  # noqa: E402


TARGET_SECONDS = 30
ROWS = (96_000, 2000, 2000)
# Of chi-square with 9 degrees of freedom, exceeded once in a hundred equal distributions.
CRITICAL = 21.67
# Light that spreads from a curve to pixels beside it.
DARK = 20


def timed(make, *arguments, **named):
    """What is made, its wall-clock seconds, and the processor's seconds."""
    wall, processor = time.perf_counter(), time.process_time()
    made = make(*arguments, **named)
    return made, time.perf_counter() - wall, time.process_time() - processor


def two_samples(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Chi-square of two rows of counts against one distribution."""
    both, counts = ours + theirs, np.stack([ours, theirs])
    expected = counts.sum(axis=1, keepdims=True) * both / both.sum()
    return float(((counts - expected) ** 2 / expected).sum())


def linked(image: list[int], size: int) -> bool:
    """Whether lit pixels lead from marker to marker in jumps of at most three pixels."""
    steps = [(down, right) for down in range(-3, 4) for right in range(-3, 4) if down**2 + right**2 <= 9]
    left = {divmod(place, size) for place, light in enumerate(image) if light > DARK}
    start, goal = markers(image, size)
    edge = [start]
    while edge:
        row, column = edge.pop()
        near = {(row + down, column + right) for down, right in steps} & left
        if goal in near:
            return True
        left -= near
        edge += near
    return False


def measure_listops(options) -> dict:
    setting = ListOpsSetting()
    with tempfile.TemporaryDirectory() as folder:
        data, seconds, processor = timed(listops, ROWS, workers=options.workers, cache=folder)
        data, again, _ = timed(listops, ROWS, workers=options.workers, cache=folder)
        size = sum(file.stat().st_size for file in Path(folder).rglob("*") if file.is_file())
        labels = np.concatenate([part.with_format("numpy")["label"] for part in data.values()])
        solved = longest = tokens = 0
        for row in tqdm(data["train"].select(range(options.solved)), desc="ListOps parsed"):
            value, depth, arguments = parse(listops_text(row["input_ids"]))
            assert depth <= setting.max_depth and arguments <= setting.max_arguments
            assert setting.min_length < len(row["input_ids"]) < setting.max_length
            solved += value == row["label"]
            longest, tokens = max(longest, len(row["input_ids"])), tokens + len(row["input_ids"])
    chance = random.Random(0)
    limits = (setting.min_length, setting.max_length, setting.max_depth, setting.max_arguments)
    by_row, loop_seconds, loop_processor = timed(
        lambda: [listops_row(chance, *limits)[1] for _ in tqdm(range(options.loop_rows), desc="row by row")]
    )
    ours, theirs = np.bincount(labels, minlength=10), np.bincount(by_row, minlength=10)
    return {
        "rows": ROWS,
        "workers": options.workers,
        "seconds": seconds,
        "processor_seconds": processor,
        "seconds_from_cache": again,
        "megabytes": size / 1e6,
        "rows_a_second": sum(ROWS) / seconds,
        "row_by_row": {
            "rows": options.loop_rows,
            "rows_a_second": options.loop_rows / loop_seconds,
            "rows_a_processor_second": options.loop_rows / loop_processor,
        },
        "label_shares": (ours / ours.sum()).round(4).tolist(),
        "label_shares_row_by_row": (theirs / theirs.sum()).round(4).tolist(),
        "chi_square": two_samples(ours, theirs),
        "chi_square_allowed": CRITICAL,
        "solved": solved,
        "of": options.solved,
        "mean_length": tokens / options.solved,
        "longest": longest,
    }


def measure_pathfinder(options) -> dict:
    setting = PathfinderSetting()
    size = setting.image_size
    wanted = (options.images, 2000, 2000)
    with tempfile.TemporaryDirectory() as folder:
        data, seconds, processor = timed(pathfinder, wanted, paths=True, workers=options.workers, cache=folder)
        solved = simple = 0
        for row in tqdm(data["train"].select(range(options.solved)), desc="Pathfinder traced"):
            simple += linked(row["input_ids"], size) == row["label"]
            found = trace(row["input_ids"], row["paths"], size)
            solved += found == (row["label"], 2 + setting.distractors)
    rows = make_pathfinder(setting, wanted, workers=options.workers)["train"]
    images = rows.columns["input_ids"].reshape(-1, size, size)
    statistics = trivial_statistics(images)
    return {
        "rows": wanted,
        "seconds": seconds,
        "rows_a_second": sum(wanted) / seconds,
        "rows_a_processor_second": sum(wanted) / processor,
        "connected": float(rows.labels.mean()),
        "solved": solved,
        "of": options.solved,
        "linked_on_the_image_alone": simple / options.solved,
        "above_chance": {name: best_threshold(values, rows.labels) for name, values in statistics.items()},
        "above_chance_standard_error": 0.5 / sqrt(options.images / 2),
        "above_chance_light_between_markers": best_threshold(light_between(images), rows.labels),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--loop_rows", type=int, default=20_000)
    parser.add_argument("--solved", type=int, default=5000)
    parser.add_argument("--images", type=int, default=40_000)
    options = parser.parse_args()
    quiet()
    disable_progress_bars()
    lists, images = measure_listops(options), measure_pathfinder(options)
    print(
        f"ListOps {sum(ROWS)} rows: {lists['seconds']:.1f} s ({lists['processor_seconds']:.1f} s of processor), from "
        f"the cache {lists['seconds_from_cache']:.2f} s; row by row {lists['row_by_row']['rows_a_second']:.0f} rows/s "
        f"({lists['row_by_row']['rows_a_processor_second']:.0f} a second of processor)\n"
        f"labels {lists['label_shares']}\nby row {lists['label_shares_row_by_row']}\n"
        f"chi-square {lists['chi_square']:.1f} (allowed {CRITICAL}); solved {lists['solved']} of {lists['of']}\n"
        f"Pathfinder {images['rows_a_second']:.0f} rows/s; solved {images['solved']} of {images['of']}; connected "
        f"{images['connected']:.4f}; above chance (standard error {images['above_chance_standard_error']:.4f}):"
    )
    for name, share in images["above_chance"].items():
        print(f"  {name:32s} {share:+.4f}")
    print(f"  {'light on the line between them':32s} {images['above_chance_light_between_markers']:+.4f}")
    print(f"  {'linking lit pixels':32s} {images['linked_on_the_image_alone'] - 0.5:+.4f}")
    reached = lists["seconds"] <= TARGET_SECONDS and lists["chi_square"] <= CRITICAL
    reached &= lists["solved"] == images["solved"] == options.solved
    print(f"target of {TARGET_SECONDS} s, equal shares and all rows solved {'reached' if reached else 'missed'}")
    results = {"target_seconds": TARGET_SECONDS, "reached": reached, "numpy": versions("numpy")["numpy"]}
    write("longrange_generation", results | {"listops": lists, "pathfinder": images})


if __name__ == "__main__":
    main()
