"""Operator tables of the hot paths, saved as small text files beside the results."""

import re
from collections.abc import Callable

from _shared import RESULTS
from _speed_decode import Decoder
from _speed_forward import Settings, forward_work, projector_work, training_work
from _speed_shapes import Shape, half_and_half, one_layer_slices, supernet, tokens
from torch.profiler import ProfilerActivity, profile


FOLDER = RESULTS / "profiles"
LINES = 20
CONTEXT = 256


def hot_paths(shape: Shape) -> dict[str, Callable[[], Callable]]:
    """Name -> what makes one run of the path."""
    ids = tokens(shape, shape.batch, shape.length)

    def decoding(build, side):
        pair, steps = build(shape), 8
        decoder = Decoder.filled(getattr(pair, side), tokens(shape, 1, CONTEXT + 2 * steps), 2 * steps)
        work = decoder.work()
        return lambda: work.run(work.prepare())

    return {
        "supernet forward": lambda: forward_work(supernet(shape)[0], ids).run,
        "supernet training step": lambda: training_work(supernet(shape)[0], ids).run,
        "projectors in training": lambda: projector_work(supernet(shape)[0], ids, True).run,
        "forward": lambda: forward_work(half_and_half(shape).hybrid, ids).run,
        "decode": lambda: decoding(half_and_half, "hybrid"),
        "decode native": lambda: decoding(half_and_half, "native"),
        "decode one-layer slices": lambda: decoding(one_layer_slices, "hybrid"),
        "decode one-layer slices native": lambda: decoding(one_layer_slices, "native"),
    }


def profiles(shape: Shape, settings: Settings) -> list[dict]:
    """
    One profiled run of each hot path behind a run that is not: the file with its table, how many operators it calls
    and the milliseconds that they take themselves.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    rows = []
    for name, make in hot_paths(shape).items():
        run = make()
        run()
        with profile(activities=[ProfilerActivity.CPU], acc_events=True) as found:
            run()
        averages = found.key_averages()
        file = FOLDER / f"{shape.name}_{name.replace(' ', '_').replace('-', '_')}.txt"
        table = averages.table(sort_by="self_cpu_time_total", row_limit=LINES, max_name_column_width=40)
        file.write_text(re.sub(r"[ \t]+\n", "\n", table).strip() + "\n")
        calls = sum(event.count for event in averages)
        spent = sum(event.self_cpu_time_total for event in averages) / 1e3
        rows.append({"name": f"profile, {name}", "file": file.name, "operators": calls, "milliseconds": spent})
    return rows
