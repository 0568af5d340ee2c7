"""MAD's tasks as data (arXiv 2403.17844): their default settings, their axes of difficulty, and what is checked."""

from dataclasses import dataclass, fields, replace


VALIDATION_ROWS = 1280
TEST_ROWS = 1280


@dataclass(frozen=True)
class MadSetting:
    """
    One task at one difficulty.

    Attributes:
        vocab_size: tokens 0..vocab_size - 1, with the noise and special tokens.
        sequence_length: tokens of a row.
        train_rows: rows of the train split.
        noise_vocab_size: noisy recall: the last so many tokens of the vocabulary are noise.
        noise: noisy recall: the probability that two neighbouring tokens are noise and no pair.
        copies: selective copying: tokens to copy.
        motif_size: fuzzy recall: keys and values have 1..motif_size tokens.
    """

    task: str
    vocab_size: int
    sequence_length: int
    train_rows: int
    noise_vocab_size: int = 0
    noise: float = 0.0
    copies: int = 0
    motif_size: int = 0


SETTINGS = {
    setting.task: setting
    for setting in (
        MadSetting("in-context-recall", 16, 128, 12_800),
        MadSetting("fuzzy-in-context-recall", 16, 128, 12_800, motif_size=3),
        MadSetting("noisy-in-context-recall", 32, 128, 12_800, noise_vocab_size=16, noise=0.2),
        MadSetting("selective-copying", 16, 256, 12_800, copies=16),
        MadSetting("memorization", 256, 32, 256),
        MadSetting("compression", 16, 32, 12_800),
    )
}

_VOCABULARIES = (32, 64, 128)
_LENGTHS = (256, 512, 1024)
_ROWS = (6400, 3200, 1600, 800)

# One axis is changed at a time, the rest stays at the default.
AXES: dict[str, dict[str, tuple]] = {
    "in-context-recall": {"vocab_size": _VOCABULARIES, "sequence_length": _LENGTHS, "train_rows": _ROWS},
    "fuzzy-in-context-recall": {"vocab_size": _VOCABULARIES, "sequence_length": _LENGTHS, "train_rows": _ROWS},
    "noisy-in-context-recall": {
        "vocab_size": (48, 80, 144),
        "sequence_length": _LENGTHS,
        "train_rows": _ROWS,
        "noise": (0.4, 0.6, 0.8),
    },
    "selective-copying": {
        "vocab_size": _VOCABULARIES,
        "sequence_length": (512, 1024),
        "train_rows": _ROWS,
        "copies": (32, 64, 96),
    },
    "memorization": {"vocab_size": (512, 1024, 2048, 4096, 8192)},
    "compression": {"vocab_size": _VOCABULARIES, "sequence_length": (64, 128, 256), "train_rows": _ROWS},
}

# Fields that only some tasks have; the others are fields of every task.
OWN_FIELDS = {
    "noise_vocab_size": ("noisy-in-context-recall",),
    "noise": ("noisy-in-context-recall",),
    "copies": ("selective-copying",),
    "motif_size": ("fuzzy-in-context-recall",),
}


def setting_of(task: str, **changes: int | float | None) -> MadSetting:
    """
    The default setting of a task with some fields changed (None keeps a field), checked.

    Raises:
        ValueError: an unknown task or field, a field of another task, or a value with which the task has no rows.
    """
    if task not in SETTINGS:
        raise ValueError(f"task: got {task!r}, allowed are {', '.join(SETTINGS)}.")
    known = [field.name for field in fields(MadSetting) if field.name != "task"]
    for name, value in changes.items():
        if name not in known:
            raise ValueError(f"{name}: it is no field of a MAD task, allowed are {', '.join(known)}.")
        if value is not None and task not in OWN_FIELDS.get(name, (task,)):
            raise ValueError(f"{name}: got {value!r} for {task!r}, allowed only for {', '.join(OWN_FIELDS[name])}.")
    setting = replace(SETTINGS[task], **{name: value for name, value in changes.items() if value is not None})
    check(setting)
    return setting


def difficulties(task: str) -> list[MadSetting]:
    """
    The settings whose mean is a task's score: the default, then one axis changed at a time.

    Raises:
        ValueError: an unknown task.
    """
    default = setting_of(task)
    return [default] + [setting_of(task, **{axis: value}) for axis, values in AXES[task].items() for value in values]


def check(setting: MadSetting) -> None:
    """
    Raises:
        ValueError: a field is no number of its kind, or the task has no rows with it.
    """
    for field in fields(MadSetting):
        value = getattr(setting, field.name)
        if field.name in ("task", "noise"):
            continue
        smallest = 1 if setting.task in OWN_FIELDS.get(field.name, (setting.task,)) else 0
        require_integer(field.name, value, smallest)
    if setting.vocab_size > 2**16:
        raise ValueError(f"vocab_size: got {setting.vocab_size}, allowed is at most {2**16}.")
    _CHECKS[setting.task](setting)


def require_integer(name: str, value: object, smallest: int) -> None:
    """
    Raises:
        ValueError: the value is no integer of at least `smallest`.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < smallest:
        raise ValueError(f"{name}: got {value!r}, allowed is an integer of at least {smallest}.")


def _at_least(name: str, value: int, smallest: int, why: str) -> None:
    if value < smallest:
        raise ValueError(f"{name}: got {value}, allowed is at least {smallest} ({why}).")


def _check_recall(setting: MadSetting) -> None:
    if setting.task == "noisy-in-context-recall" and not (
        isinstance(setting.noise, (int, float)) and not isinstance(setting.noise, bool) and 0 <= setting.noise < 1
    ):
        raise ValueError(f"noise: got {setting.noise!r}, allowed is a number of at least 0 and below 1.")
    _at_least("vocab_size", setting.vocab_size, setting.noise_vocab_size + 4, "two keys and two values beside noise")
    _at_least("sequence_length", setting.sequence_length, 4, "a pair, and the same key again")
    if setting.sequence_length % 2:
        raise ValueError(f"sequence_length: got {setting.sequence_length}, allowed is an even number.")


def _check_fuzzy(setting: MadSetting) -> None:
    size = setting.motif_size
    _at_least("vocab_size", setting.vocab_size, 2 * size + 1, f"keys and values of {size} tokens, padding")
    _at_least("sequence_length", setting.sequence_length, 4 * size, "a pair, and the same key again")
    if (setting.vocab_size // 2) ** size > 2**40:
        raise ValueError(f"motif_size: got {size}, allowed is less with a vocabulary of {setting.vocab_size}.")


def _check_copying(setting: MadSetting) -> None:
    _at_least("vocab_size", setting.vocab_size, 4, "two tokens to copy, a blank, the copy token")
    _at_least(
        "sequence_length", setting.sequence_length, 2 * setting.copies + 2, f"{setting.copies} tokens twice, a blank"
    )


def _check_memorization(setting: MadSetting) -> None:
    _at_least("vocab_size", setting.vocab_size, 5, "two keys, two values, the token in the value's place")
    if setting.sequence_length % 2:
        raise ValueError(f"sequence_length: got {setting.sequence_length}, allowed is an even number.")
    pairs, keys = setting.sequence_length // 2, (setting.vocab_size - 1) // 2
    _at_least("train_rows", setting.train_rows, -(-keys // pairs), f"all {keys} keys, {pairs} in a row")


def _check_compression(setting: MadSetting) -> None:
    _at_least("vocab_size", setting.vocab_size, 3, "two tokens, and the one that carries the sequence")
    _at_least("sequence_length", setting.sequence_length, 2, "a token, and the one that carries it")


_CHECKS = {
    "in-context-recall": _check_recall,
    "fuzzy-in-context-recall": _check_fuzzy,
    "noisy-in-context-recall": _check_recall,
    "selective-copying": _check_copying,
    "memorization": _check_memorization,
    "compression": _check_compression,
}
