"""
What the options of an experiment's tasks must be, tested before anything is made. Each function takes all arguments of
its task's maker, and may return the names of test splits beside `test`.
"""

from typing import Any

from ..tasks.mad.settings import require_integer, setting_of


def check_mad(task: str, validation_rows: int, test_rows: int, seed: int, **fields: Any) -> None:
    """
    Raises:
        ValueError: as `setting_of`, or too few rows for evaluation.
    """
    require_integer("validation_rows", validation_rows, 1)
    require_integer("test_rows", test_rows, 1)
    setting_of(task, **fields)


def check_mqar(**given: Any) -> list[str]:
    """
    Raises:
        ValueError: as `mqar`.
    """
    from ..tasks.mqar import MqarSetting, longer_settings

    names = list(MqarSetting.__dataclass_fields__)
    setting = MqarSetting(**{name: given[name] for name in names})
    for name in ("train_rows", "validation_rows", "test_rows"):
        require_integer(name, given[name], 1)
    longer = given["longer"]
    if not isinstance(longer, (list, tuple)):
        raise ValueError(f"longer: got {longer!r}, allowed is a list of multiples.")
    return [f"test_{multiple}x" for multiple in longer_settings(setting, longer, given["scale_pairs"])]


def check_listops(rows: Any, seed: int, workers: Any, cache: Any, **fields: Any) -> None:
    """
    Raises:
        ValueError: as `listops`.
    """
    from ..tasks.generated import check_sizes
    from ..tasks.listops import ListOpsSetting, check

    check_sizes(rows, seed, workers)
    check(ListOpsSetting(**fields))


def check_pathfinder(rows: Any, seed: int, workers: Any, cache: Any, paths: Any, **fields: Any) -> None:
    """
    Raises:
        ValueError: as `pathfinder`.
    """
    from ..tasks.generated import check_sizes
    from ..tasks.pathfinder import PathfinderSetting, check

    check_sizes(rows, seed, workers)
    check(PathfinderSetting(**fields))


def check_files(folder: Any, **given: Any) -> None:
    """
    The user's copies of data sets, as far as it can be seen without reading them.

    Raises:
        ValueError: no such folder, a length that is no positive integer, or a share that is none.
    """
    from ..tasks.lra import check_share, existing_folder

    existing_folder(folder)
    check_standin(**given)
    if "validation" in given:
        check_share(given["validation"])


def check_standin(**given: Any) -> None:
    """
    Raises:
        ValueError: a length that is no positive integer.
    """
    for name in ("sequence_length", "document_length"):
        if name in given:
            require_integer(name, given[name], 1)
