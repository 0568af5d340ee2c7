"""
What a hybrid costs against what its parts cost: passes, decoding, loading, scoring, calibration and data, on three
shapes with random weights. Every ratio comes from one run in which both sides take turns, with a 95 % interval, and
beside it the ratio of the reference to itself (benchmarks/_timing.py says how they are made and judged).

    python benchmarks/speed.py --shapes tiny small --measures decode --minutes 20 --resume

Results are written after every measure; with --resume those that the file has under the same settings are kept, so a
stopped run goes on. Exits with 1 where a bound fails; bounds hold for the shapes small and 100m, at the shape tiny
fixed costs are a larger share and the table only shows how it stands.
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from _shared import RESULTS, quiet
from _speed_decode import DECODING
from _speed_forward import Settings, discretized_forward, prefill, supernet_forward, supernet_training
from _speed_loading import loading
from _speed_parallel import side_by_side_generation, side_by_side_training
from _speed_profile import profiles
from _speed_report import draw, print_rows
from _speed_search import calibration, data_generation, stitch_scoring
from _speed_shapes import SHAPES
from _timing import CLOCKS, fix_threads, machine


MEASURES = {
    "discretized forward": discretized_forward,
    "supernet forward": supernet_forward,
    "supernet training": supernet_training,
    **DECODING,
    "prefill": prefill,
    "loading": loading,
    "stitch": stitch_scoring,
    "calibration": calibration,
    "hooks training": side_by_side_training,
    "hooks generation": side_by_side_generation,
    "profiles": profiles,
}
WITHOUT_SHAPE = {"data generation": data_generation}  # measured once
FILE = RESULTS / "speed.json"


def options() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument(
        "--measures", nargs="+", choices=[*names()], default=[*names()], metavar="NAME", help=", ".join(names())
    )
    parser.add_argument("--seconds", type=float, default=10.0, help="of one comparison, beyond its fewest rounds")
    parser.add_argument("--rounds", type=int, default=7, help="fewest rounds of a comparison, at least 2")
    parser.add_argument("--clock", choices=CLOCKS, default="processor", help="that bounds are judged by")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--minutes", type=float, help="begin no further measure after so many")
    parser.add_argument("--resume", action="store_true", help="keep what the file has under the same settings")
    parser.add_argument("--file", type=Path, default=FILE, help="of the results")
    given = parser.parse_args()
    for name, least in (("rounds", 2), ("threads", 1)):
        if getattr(given, name) < least:
            parser.error(f"--{name}: got {getattr(given, name)}, allowed is at least {least}")
    return given


def names() -> dict[str, str]:
    """Measures by their names on the command line."""
    return {name.replace(" ", "-"): name for name in [*MEASURES, *WITHOUT_SHAPE]}


def save(file: Path, results: dict) -> None:
    """Write the whole file or none of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    staged = file.with_name(f".{file.name}")
    staged.write_text(json.dumps(results, indent=1) + "\n")
    os.replace(staged, file)


def main() -> None:
    """Run the measures that are asked for, shape by shape."""
    given = options()
    quiet()
    fix_threads(given.threads)
    began = time.monotonic()
    settings = Settings(given.seconds, given.clock, given.rounds)
    made_with = vars(settings) | {"threads": given.threads}
    results = json.loads(given.file.read_text()) if given.file.is_file() else {"shapes": {}}
    for shape, measure, run in plan(given.shapes, given.measures):
        of_shape = results["shapes"].setdefault(shape, {})
        if given.resume and of_shape.get(measure, {}).get("settings") == made_with:
            continue
        if given.minutes is not None and time.monotonic() - began > given.minutes * 60:
            print(f"{given.minutes:g} minutes are over; --resume goes on from here")
            break
        started = time.monotonic()
        rows = run(settings)
        made = {"settings": made_with, "machine": machine(), "took_seconds": time.monotonic() - started}
        of_shape[measure] = made | {"rows": rows}
        save(given.file, results)
        print_rows(f"{shape}, {measure}", rows)
    finish(given.file, results)


def plan(shapes: list[str], measures: list[str]) -> Iterator[tuple[str, str, Callable[[Settings], list[dict]]]]:
    """(shape, measure, what runs it), shape by shape, then what has no shape."""
    kinds = {measure: names()[measure] for measure in measures}
    for shape in shapes:
        for measure, kind in kinds.items():
            if kind in MEASURES:
                yield shape, measure, partial(MEASURES[kind], SHAPES[shape])
    for measure, kind in kinds.items():
        if kind in WITHOUT_SHAPE:
            yield "any shape", measure, WITHOUT_SHAPE[kind]


def finish(file: Path, results: dict) -> None:
    """The picture, and an error where a bound fails."""
    print(f"written: {file}")
    picture = draw(results, file.with_suffix(".svg"))
    if picture is not None:
        print(f"written: {picture}")
    failed = [
        f"{shape}, {row['name']}"
        for shape, measures in results["shapes"].items()
        if shape not in SHAPES or SHAPES[shape].is_bounded
        for found in measures.values()
        for row in found["rows"]
        if row.get("fails")
    ]
    if failed:
        raise SystemExit(f"beyond the bound: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
