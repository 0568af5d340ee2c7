"""
Seconds for 1,000 rows of each MAD task: our generators against plain Python that makes row by row and token by token
what the task's definition says, with the standard library's `random`. Both make rows of a train split, input_ids and
labels; the ways alternate and the order of the two is swapped at every repetition. Numpy arrays against lists: neither
is converted. Also the whole of `mad(...)` (three splits, no row twice, a DatasetDict) at the default sizes.
"""

import argparse
import random
import time
from statistics import median

from _shared import quiet, versions, write
from tqdm.auto import tqdm

from modeling_manticore.tasks.mad import SETTINGS, MadSetting, dataset_of, setting_of
from modeling_manticore.tasks.mad.draws import Draws
from modeling_manticore.tasks.mad.splits import generator_of


TARGET = 50
IGNORED = -100


def recall_row(setting: MadSetting, chance: random.Random) -> tuple[list[int], list[int]]:
    """Pairs with a mapping of the row's own, noise in the place of some, a last pair whose key was shown."""
    usable = setting.vocab_size - setting.noise_vocab_size
    pairs, shown = setting.sequence_length // 2, {}
    spared = chance.randrange(pairs - 1)
    input_ids, labels = [], []
    for pair in range(pairs):
        last = pair == pairs - 1
        if not last and pair != spared and setting.noise and chance.random() < setting.noise:
            input_ids += [chance.randrange(usable, setting.vocab_size) for _ in range(2)]
            labels += [IGNORED, IGNORED]
            continue
        key = chance.choice(list(shown)) if last else chance.randrange(usable // 2)
        if key in shown:
            labels += [IGNORED, shown[key]]
        else:
            shown[key] = chance.randrange(usable // 2, usable)
            labels += [IGNORED, IGNORED]
        input_ids += [key, shown[key]]
    return input_ids, labels


def fuzzy_row(setting: MadSetting, chance: random.Random) -> tuple[list[int], list[int]]:
    """Pairs of motifs while there is room for the last one, whose key was shown; padding before them."""
    padding, size = setting.vocab_size - 1, setting.motif_size
    key_tokens, value_tokens = range(padding // 2), range(padding // 2, padding)
    size_of = [chance.randint(1, size) for _ in key_tokens]
    shown: dict[tuple, list] = {}
    keys, input_ids, labels = [], [], []
    while True:
        key = tuple(chance.sample(key_tokens, size))
        key = key[: size_of[key[0]]]
        known = key in shown
        value = shown[key] if known else chance.sample(value_tokens, chance.randint(1, size))
        if len(input_ids) + len(key) + len(value) > setting.sequence_length - 2 * size:
            break
        shown[key] = value
        keys.append(key)
        input_ids += [*key, *value]
        labels += [IGNORED] * len(key) + (value if known else [IGNORED] * len(value))
    key = chance.choice(keys)
    input_ids += [*key, *shown[key]]
    labels += [IGNORED] * len(key) + shown[key]
    before = setting.sequence_length - len(input_ids)
    return [padding] * before + input_ids, [IGNORED] * before + labels


def copying_row(setting: MadSetting, chance: random.Random) -> tuple[list[int], list[int]]:
    """Every blank chooses the gap between two tokens that it goes into."""
    copies, blank = setting.copies, setting.vocab_size - 2
    tokens = [chance.randrange(blank) for _ in range(copies)]
    in_gap = [0] * (copies + 1)
    for _ in range(setting.sequence_length - 2 * copies - 1):
        in_gap[chance.randrange(copies + 1)] += 1
    input_ids = []
    for count, token in zip(in_gap, tokens):
        input_ids += [blank] * count + [token]
    input_ids += [blank] * in_gap[-1] + [setting.vocab_size - 1] + [blank] * copies
    return input_ids, [IGNORED] * (setting.sequence_length - copies) + tokens


def memorization_rows(setting: MadSetting, rows: int, chance: random.Random) -> list[tuple[list[int], list[int]]]:
    """Keys dealt from shuffled decks, with the fixed value of each as its label."""
    known, insert = (setting.vocab_size - 1) // 2, setting.vocab_size - 1
    value_of = chance.sample(range(known, insert), known)
    deck: list[int] = []
    made = []
    for _ in range(rows):
        input_ids, labels = [], []
        for _ in range(setting.sequence_length // 2):
            if not deck:
                deck = list(range(known))
                chance.shuffle(deck)
            key = deck.pop()
            input_ids += [key, insert]
            labels += [IGNORED, value_of[key]]
        made.append((input_ids, labels))
    return made


def compression_row(setting: MadSetting, chance: random.Random) -> tuple[list[int], list[int]]:
    """Random tokens and the one that carries them."""
    carrier = setting.vocab_size - 1
    tokens = [chance.randrange(carrier) for _ in range(setting.sequence_length - 1)]
    return [*tokens, carrier], [*tokens, IGNORED]


ROW = {
    "in-context-recall": recall_row,
    "fuzzy-in-context-recall": fuzzy_row,
    "noisy-in-context-recall": recall_row,
    "selective-copying": copying_row,
    "compression": compression_row,
}


def by_row(setting: MadSetting, rows: int, seed: int) -> list:
    """Rows of a task, one after the other."""
    chance = random.Random(seed)
    if setting.task == "memorization":
        return memorization_rows(setting, rows, chance)
    return [ROW[setting.task](setting, chance) for _ in range(rows)]


def vectorised(setting: MadSetting, rows: int, seed: int):
    """Rows of a task as arrays."""
    return generator_of(setting, Draws(seed))(rows, False)


def spread(values: list[float]) -> dict[str, float]:
    """Median and both ends; the machine has other work too, so single repetitions say little."""
    return {"median": median(values), "least": min(values), "most": max(values)}


def seconds(make, *arguments) -> float:
    started = time.perf_counter()
    make(*arguments)
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1000)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    quiet()
    results = {}
    for task in tqdm(SETTINGS, desc="tasks"):
        setting = setting_of(task, vocab_size=128 if task == "fuzzy-in-context-recall" else None)
        vectorised(setting, options.rows, 0)
        taken: dict = {vectorised: [], by_row: []}
        for repeat in range(options.repeats):
            for way in (vectorised, by_row) if repeat % 2 else (by_row, vectorised):
                # Ours are so short that one call would measure the cold cache that the other way leaves.
                times = 10 if way is vectorised else 1
                once = [seconds(way, setting, options.rows, repeat * times + turn) for turn in range(times)]
                taken[way].append(sum(once) / times)
        results[task] = {
            "vocab_size": setting.vocab_size,
            "sequence_length": setting.sequence_length,
            "vectorised_seconds": spread(taken[vectorised]),
            "row_by_row_seconds": spread(taken[by_row]),
            "times_faster": median(taken[by_row]) / median(taken[vectorised]),
            "times_faster_of_the_least": min(taken[by_row]) / min(taken[vectorised]),
            "whole_dataset_seconds": min(seconds(dataset_of, setting) for _ in range(3)),
        }
    print(f"{'task':26s} {'ours':>9s} {'row by row':>11s} {'faster':>7s} {'least':>6s} {'mad(...)':>9s}")
    for task, found in results.items():
        print(
            f"{task:26s} {1000 * found['vectorised_seconds']['median']:6.2f} ms "
            f"{1000 * found['row_by_row_seconds']['median']:8.1f} ms {found['times_faster']:6.0f}x "
            f"{found['times_faster_of_the_least']:5.0f}x {found['whole_dataset_seconds']:7.2f} s"
        )
    passed = all(found["times_faster"] >= TARGET for found in results.values())
    print(f"target of {TARGET} times {'reached' if passed else 'missed'}")
    made_with = {"rows": options.rows, "repeats": options.repeats, "numpy": versions("numpy")["numpy"]}
    write("mad_generation", made_with | {"target": TARGET, "reached": passed, "tasks": results})


if __name__ == "__main__":
    main()
