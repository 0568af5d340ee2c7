"""ListOps and Pathfinder: rows solved by other means, their distribution, workers, splits, the cache, bad input."""

import hashlib
import random

import numpy as np
import pytest
from datasets import DatasetDict
from long_range import best_threshold, connected_parts, listops_row, markers, parse, trace, trivial_statistics

from modeling_manticore.tasks.curves import CLEARANCE
from modeling_manticore.tasks.listops import (
    VOCABULARY,
    ListOpsSetting,
    length_shares,
    listops,
    listops_text,
    make_listops,
)
from modeling_manticore.tasks.listops import make_chunk as listops_chunk
from modeling_manticore.tasks.mad.draws import Draws
from modeling_manticore.tasks.pathfinder import PathfinderSetting, make_pathfinder, pathfinder


SHORT = ListOpsSetting(10, 60, 5, 6)


def same(splits, others):
    for split, rows in splits.items():
        for name, column in rows.columns.items():
            np.testing.assert_array_equal(column, others[split].columns[name])
        np.testing.assert_array_equal(rows.labels, others[split].labels)
        np.testing.assert_array_equal(rows.lengths, others[split].lengths)


def digest(splits):
    content = hashlib.sha256()
    for split in ("train", "validation", "test"):
        rows = splits[split]
        for column in (*rows.columns.values(), rows.lengths, rows.labels):
            content.update(column.astype("<i8").tobytes())
    return content.hexdigest()[:16]


def chi_square(counts, expected):
    """In standard deviations above what is expected, about; both (cells,)."""
    value, free = ((counts - expected) ** 2 / expected).sum(), len(counts) - 1
    return (value - free) / np.sqrt(2 * free)


@pytest.mark.parametrize(
    "setting, rows",
    [
        (SHORT, (4000, 500, 500)),
        (ListOpsSetting(), (80, 10, 10)),
        (ListOpsSetting(4, 18, 2, 15), (200, 50, 50)),
        (ListOpsSetting(20, 100, 10, 2), (200, 50, 50)),
        (ListOpsSetting(3, 50, 3, 15), (200, 50, 50)),
    ],
)
def test_listops_is_solved(setting, rows):
    seen, deepest, widest = set(), 0, 0
    for part in make_listops(setting, rows).values():
        assert part.lengths.min() > setting.min_length and part.lengths.max() < setting.max_length
        for row, label in zip(part.lists("input_ids"), part.labels.tolist()):
            text = listops_text(row)
            assert len(text.split(" ")) == len(row)
            value, depth, arguments = parse(text)
            assert value == label
            deepest, widest = max(deepest, depth), max(widest, arguments)
            seen.add(text)
    assert len(seen) == sum(rows)
    assert widest == setting.max_arguments
    assert deepest == setting.max_depth or setting == ListOpsSetting(20, 100, 10, 2) and deepest <= 10


def test_listops_is_drawn_as_defined():
    made = [listops_chunk(SHORT, Draws(0, number)) for number in range(20)]
    lengths, labels = (np.concatenate([getattr(rows, name) for rows in made]) for name in ("lengths", "labels"))
    shares = length_shares(SHORT)
    shares[: SHORT.min_length + 1] = 0
    expected = shares / shares.sum() * len(lengths)
    kept = expected > 0
    assert len(lengths) > 10_000
    assert chi_square(np.bincount(lengths, minlength=60)[kept], expected[kept]) < 4
    assert abs(sum(map(len, made)) / (20 * 2048) - shares.sum()) < 0.01

    chance = random.Random(0)
    by_row = [listops_row(chance, 10, 60, 5, 6) for _ in range(8000)]
    ours, theirs = np.bincount(labels, minlength=10), np.bincount([value for _, value in by_row], minlength=10)
    both = (ours + theirs) / (len(labels) + len(by_row))
    difference = (ours / len(labels) - theirs / len(by_row)) ** 2 / (both * (1 / len(labels) + 1 / len(by_row)))
    assert (difference.sum() - 9) / np.sqrt(18) < 4
    assert both[0] > 0.12 and both[9] > 0.12 and both[1:9].max() < 0.12

    # Operators, and arguments of each, are uniform but for the condition on the length: as row by row.
    words = [listops_text(row).split(" ") for rows in made for row in rows.lists("input_ids")]
    for word in ("[MIN", "[MAX", "[MED", "[SM", "0", "9"):
        ours = np.array([row.count(word) for row in words])
        theirs = np.array([text.split(" ").count(word) for text, _ in by_row])
        error = np.sqrt(ours.var() / len(ours) + theirs.var() / len(theirs))
        assert abs(ours.mean() - theirs.mean()) < 4 * error
        assert abs(ours.std() - theirs.std()) < 0.05 * theirs.std()


@pytest.fixture(scope="module")
def images():
    return make_pathfinder(PathfinderSetting(), (4000, 500, 500))


def test_pathfinder_is_solved(images):
    for part in images.values():
        assert part.labels.mean() == 0.5
        for image, paths, label in zip(part.lists("input_ids"), part.lists("paths"), part.labels.tolist()):
            assert len(image) == len(paths) == 32**2
            assert trace(image.tolist(), paths.tolist(), 32) == (label, 7)


@pytest.mark.parametrize(
    "setting",
    [
        PathfinderSetting(16, 10, 0),
        PathfinderSetting(24, 14, 2, dash=2, gap=3),
        PathfinderSetting(64, 40, 12),
        PathfinderSetting(32, 20, 5, dash=20, gap=0),
    ],
)
def test_other_pathfinders_are_solved(setting):
    size = setting.image_size
    for part in make_pathfinder(setting, (20, 10, 10)).values():
        for image, paths, label in zip(part.lists("input_ids"), part.lists("paths"), part.labels.tolist()):
            assert trace(image.tolist(), paths.tolist(), size) == (label, 2 + setting.distractors)


def test_paths_are_curves_with_markers_on_their_ends(images):
    rows, dark = images["test"], []
    for image, paths in list(zip(rows.lists("input_ids"), rows.lists("paths")))[:200]:
        grid = paths.reshape(32, 32)
        parts = connected_parts(zip(*(axis.tolist() for axis in grid.nonzero())))
        # Steps of a pixel's length, some of which stay on a pixel.
        pixels = sorted(map(len, parts))
        assert all(0.6 * most < count <= most for count, most in zip(pixels, [6] * 5 + [20] * 2))
        for middle in markers(image.tolist(), 32):
            (own,) = [part for part in parts if middle in part]
            # On an end, all neighbours are to one side: the opposite of none of them is on the path.
            near = [(row - middle[0], column - middle[1]) for row, column in own - {middle}]
            near = {place for place in near if max(map(abs, place)) == 1}
            assert near and not any((-down, -right) in near for down, right in near)
            assert all(
                max(abs(row - middle[0]), abs(column - middle[1])) > CLEARANCE
                for part in parts
                if part is not own
                for row, column in part
            )
        # Dashes are on the paths, but for what is spread to the next pixel.
        wide = np.zeros((34, 34), dtype=bool)
        for down in range(3):
            for right in range(3):
                wide[down : down + 32, right : right + 32] |= grid > 0
        light = image.reshape(32, 32)
        assert (light[~wide[1:-1, 1:-1]] == 0).all()
        dark.append((light[grid > 0] < 50).mean())
    assert 0.25 < np.mean(dark) < 0.45


def test_no_trivial_statistic_tells_connection(images):
    rows = images["train"]
    told = {
        name: best_threshold(values, rows.labels)
        for name, values in trivial_statistics(rows.columns["input_ids"].reshape(-1, 32, 32)).items()
    }
    # A standard deviation of chance is 1.1 %.
    assert {name: share for name, share in told.items() if share > 0.04} == {}
    assert best_threshold(rows.labels + 0.0, rows.labels) == 0.5


@pytest.mark.parametrize(
    "make, setting, known",
    [
        (make_listops, SHORT, "554a8eebc2b1c169"),
        (make_pathfinder, PathfinderSetting(16, 10, 1), "4252e3ccc3cd6124"),
    ],
)
def test_rows_depend_on_the_seed_alone(make, setting, known):
    rows = (700, 60, 40)
    splits = make(setting, rows, seed=5, workers=1)
    assert digest(splits) == known
    same(splits, make(setting, rows, seed=5, workers=3))
    assert digest(make(setting, rows, seed=6)) != known
    again = make(setting, (50, 60, 40), seed=5, workers=2)
    same({name: again[name] for name in ("validation", "test")}, splits)
    contents = [row.tobytes() for part in splits.values() for row in part.lists("input_ids")]
    assert len(set(contents)) == len(contents) == 800


def test_datasets_and_their_cache(tmp_path):
    lengths = {"min_length": 10, "max_length": 60, "max_depth": 5, "max_arguments": 6}
    data = listops((30, 5, 4), **lengths, seed=3, cache=tmp_path)
    assert isinstance(data, DatasetDict) and {name: len(part) for name, part in data.items()} == {
        "train": 30,
        "validation": 5,
        "test": 4,
    }
    assert data["train"].column_names == ["input_ids", "label"]
    assert data["train"].features["label"].names == list("0123456789")
    made = make_listops(SHORT, (30, 5, 4), seed=3)["train"]
    assert [row["input_ids"] for row in data["train"]] == [row.tolist() for row in made.lists("input_ids")]
    assert parse(listops_text(data["train"][7]["input_ids"]))[0] == data["train"][7]["label"]
    assert data["train"].with_format("torch")[0]["input_ids"].dtype.is_signed

    (kept,) = tmp_path.iterdir()
    times = {file: file.stat().st_mtime_ns for file in kept.rglob("*")}
    again = listops((30, 5, 4), **lengths, seed=3, cache=tmp_path)
    assert [list(part) for part in again.values()] == [list(part) for part in data.values()]
    assert times == {file: file.stat().st_mtime_ns for file in kept.rglob("*")}
    listops((30, 5, 4), **lengths, seed=4, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
    listops((30, 5, 4), **lengths, seed=5, cache=False)
    assert len(list(tmp_path.iterdir())) == 2

    plain = pathfinder((6, 2, 2), image_size=16, curve_length=10, distractors=1, cache=tmp_path)
    carried = pathfinder((6, 2, 2), image_size=16, curve_length=10, distractors=1, paths=True, cache=tmp_path)
    assert len(list(tmp_path.iterdir())) == 4
    assert plain["train"].column_names == ["input_ids", "label"]
    assert carried["train"].column_names == ["input_ids", "paths", "label"]
    for row, other in zip(plain["train"], carried["train"]):
        assert row["input_ids"] == other["input_ids"] and len(row["input_ids"]) == 256
        assert trace(other["input_ids"], other["paths"], 16) == (row["label"], 3)


def test_text():
    row = [11, 4, 3, 10, 2, 3, 14, 1, 14, 15, 15]
    assert listops_text(row) == "[MAX 4 3 [MIN 2 3 ] 1 ]" and len(VOCABULARY) == 16
    with pytest.raises(ValueError, match=r"input_ids: got 16 at 1, allowed are 0\.\.15"):
        listops_text([1, 16])


@pytest.mark.parametrize(
    "task, changes, message",
    [
        (listops, {"rows": (3, 4)}, r"rows: got \(3, 4\), allowed are three integers"),
        (listops, {"rows": (3, 0, 4)}, r"rows \(validation\): got 0, allowed is an integer of at least 1"),
        (listops, {"seed": -1}, "seed: got -1"),
        (listops, {"workers": 0}, "workers: got 0, allowed is an integer of at least 1"),
        (listops, {"min_length": 0}, "min_length: got 0, allowed is an integer of at least 1"),
        (listops, {"max_length": 501}, "max_length: got 501, allowed is at least 502"),
        (listops, {"max_length": 1e3}, "max_length: got 1000.0, allowed is an integer"),
        (listops, {"max_length": 70_000}, "max_length: got 70000, allowed is at most 65536"),
        (listops, {"max_depth": 1}, "max_depth: got 1, allowed is an integer of at least 2"),
        (listops, {"max_arguments": 16}, "max_arguments: got 16, allowed is at most 15"),
        (listops, {"max_depth": 3}, "min_length, max_length: got 500 and 2000, but a share of"),
        (
            listops,
            {"rows": (5000, 1, 1), "min_length": 3, "max_length": 5, "max_depth": 2},
            r"rows \(train\): got 5000, but",
        ),
        (pathfinder, {"image_size": 8}, "image_size: got 8, allowed is an integer of at least 12"),
        (pathfinder, {"image_size": 257}, "image_size: got 257, allowed is at most 256"),
        (pathfinder, {"curve_length": 7}, "curve_length: got 7"),
        (pathfinder, {"distractors": -1}, "distractors: got -1"),
        (pathfinder, {"distractors": 40}, "image_size: got 32, but curve_length 20 and 40 distractors ask for"),
        (pathfinder, {"dash": 0}, "dash: got 0"),
        (pathfinder, {"gap": True}, "gap: got True"),
        (pathfinder, {"paths": 1}, "paths: got 1, allowed are True and False"),
        (pathfinder, {"rows": 3}, "rows: got 3"),
    ],
)
def test_bad_input(task, changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        task(**{"cache": tmp_path} | changes)
    assert not list(tmp_path.iterdir())
