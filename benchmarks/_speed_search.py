"""Speed of what is done without training: calibration, scoring candidates with `stitch`, and making data."""

from statistics import median

import torch
from _speed_forward import Settings
from _speed_shapes import Shape, supernet, tokens
from _timing import Work, take_turns

from modeling_manticore import calibrate
from modeling_manticore.building.discretize import usable_paths
from modeling_manticore.building.texts import batches_of
from modeling_manticore.search.slices import SliceRunner, tree_of
from modeling_manticore.tasks.listops import ListOpsSetting, make_listops
from modeling_manticore.tasks.mad import setting_of
from modeling_manticore.tasks.mad.draws import Draws
from modeling_manticore.tasks.mad.splits import generator_of
from modeling_manticore.tasks.mqar import MqarSetting
from modeling_manticore.tasks.mqar import make_rows as mqar_rows
from modeling_manticore.tasks.pathfinder import PathfinderSetting, make_pathfinder


STITCH_BOUND = 1.2
BLOCKS = 3
ROWS = 8
GENERATED_ROWS = 200


def stitch_scoring(shape: Shape, settings: Settings) -> list[dict]:
    """
    The losses of all candidates of a supernet, against one pass over the same held-out text of every slice that a
    candidate does not share with the one before it in the tree of choices, and of its head and loss.
    """
    model, components = supernet(shape, BLOCKS)
    paths = usable_paths(model)
    runner = SliceRunner(model, paths)
    runner.fit_bridges(batches_of(tokens(shape, ROWS, shape.length, seed=3), model), progress=False)
    scored = batches_of(tokens(shape, ROWS, shape.length), model)
    choices = [tuple(choice) for choice in torch.cartesian_prod(*map(torch.tensor, paths)).tolist()]
    measured = Work(lambda: runner.losses(choices, scored, lambda means: None))
    alone = Work(lambda: _slices_alone(runner, tree_of(choices), scored))
    row = settings.compare(f"stitch, {len(choices)} candidates", measured, alone, STITCH_BOUND)
    return [row | {"seconds_per_candidate": row["seconds"] / len(choices), "candidates": len(choices)}]


@torch.inference_mode()
def _slices_alone(runner: SliceRunner, tree: dict, batches: list) -> None:
    """Every node of the tree once on the states of its own component: no bridge, nothing but slices and heads."""
    config = runner.config

    def visit(batch, depth, branch, component):
        if depth == runner.blocks:
            runner.loss(batch, component, states[component])
            return
        for p, below in branch.items():
            own = config.blocks[depth][p]["component"]
            if depth == 0:
                runner.start(batch, p)
            runner.slice(batch, depth, p, states[own])
            visit(batch, depth + 1, below, own)

    for batch in batches:
        states = {
            k: torch.randn(*batch.input_ids.shape, config.components[k].hidden_size) for k in config.used_components
        }
        visit(batch, 0, tree, None)


def calibration(shape: Shape, settings: Settings) -> list[dict]:
    """Fitting all projectors of a supernet, against one forward pass of every component over the same text."""
    model, components = supernet(shape, BLOCKS)
    text = tokens(shape, ROWS * 2, shape.length)

    @torch.inference_mode()
    def passes():
        for component in components:
            for part in text.split(8):
                component(part, use_cache=False)

    fit = Work(lambda: calibrate(model, text, progress=False))
    row = settings.compare("calibration", fit, Work(passes))
    return [row | {"tokens_per_second": text.numel() / row["seconds"]}]


def data_generation(settings: Settings) -> list[dict]:
    """Milliseconds of a thousand rows of each generator, one worker."""
    pairs = MqarSetting(vocab_size=128, sequence_length=64, num_pairs=8)
    makers = {
        "MAD, in-context recall": lambda rows: generator_of(setting_of("in-context-recall"), Draws(0))(rows, False),
        "MQAR": lambda rows: mqar_rows(pairs, rows, draws=Draws(0)),
        "ListOps": lambda rows: make_listops(ListOpsSetting(), (rows, 1, 1), workers=1),
        "Pathfinder": lambda rows: make_pathfinder(PathfinderSetting(), (rows, 2, 2), workers=1),
    }
    works = {name: Work(lambda make=make: make(GENERATED_ROWS)) for name, make in makers.items()}
    taken = take_turns(works, settings.seconds, fewest=settings.fewest)
    rows = []
    for name in works:
        own = {clock: 1e6 * median(samples[name]) / GENERATED_ROWS for clock, samples in taken.items()}
        rows.append({"name": f"data, {name}", "milliseconds_of_1000_rows": own[settings.clock], "clocks": own})
    return rows
