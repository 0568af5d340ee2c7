"""Speed of whole passes: discretized hybrids against native models, supernets against the sum of their components."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from _speed_shapes import (
    Pair,
    Shape,
    alternating,
    half_and_half,
    one_layer_slices,
    one_slice,
    supernet,
    tokens,
    with_our_mamba,
)
from _timing import Work, compare
from torch import nn
from transformers import PreTrainedModel

from modeling_manticore.mixing_manticore import Projector
from modeling_manticore.scan_manticore import use_own_scan


FORWARD_BOUND = 1.03
SUPERNET_BOUND = 1.05
SUPERNETS = {"": SUPERNET_BOUND, " (our Mamba in both)": None}  # what stands behind a row's name, and its bound
PAIRS: dict[str, Callable[[Shape], Pair]] = {
    "one slice": one_slice,
    "half and half": half_and_half,
    "half and half (our Mamba in both)": partial(with_our_mamba, half_and_half),
    "one-layer slices": one_layer_slices,
    "alternating slices": alternating,
    "alternating slices (our Mamba in both)": partial(with_our_mamba, alternating),
}
CLOSE = 1e-3


@dataclass(frozen=True)
class Settings:
    """Wall seconds of one comparison, the clock that is judged by, and the fewest rounds."""

    seconds: float = 10.0
    clock: str = "processor"
    fewest: int = 7

    def compare(self, name: str, measured, reference, bound: float | None = None, **more) -> dict:
        """A row of the table: `measured` against `reference`."""
        found, clocks = compare(measured, reference, self.seconds, self.clock, fewest=self.fewest)
        return {"name": name} | found.row(bound) | {"clocks": clocks} | more


def must_agree(pair: Pair, ids: torch.LongTensor) -> float:
    """
    Largest difference of the logits of the two models, which must be the same function.

    Raises:
        RuntimeError: they are not; a ratio of their times would say nothing.
    """
    with torch.inference_mode():
        ours, native = pair.hybrid(ids, use_cache=False).logits, pair.native(ids, use_cache=False).logits
    difference = (ours - native).abs().max().item()
    if not difference < CLOSE:
        raise RuntimeError(f"the hybrid and the native model of its layers differ by {difference} in their logits")
    return difference


def forward_work(model: nn.Module, ids: torch.LongTensor) -> Work:
    """One forward pass without a cache."""

    @torch.inference_mode()
    def run():
        model(ids, use_cache=False)

    return Work(run)


def discretized_forward(shape: Shape, settings: Settings) -> list[dict]:
    """One pass over (batch, length) tokens, against the native model of the same layers."""
    ids, rows = tokens(shape, shape.batch, shape.length), []
    for name, build in PAIRS.items():
        pair = build(shape)
        difference = must_agree(pair, ids)
        works = forward_work(pair.hybrid, ids), forward_work(pair.native, ids)
        bound = pair.bound(FORWARD_BOUND)
        rows.append(settings.compare(f"forward, {name}", *works, bound, logits_differ_by=difference))
    return rows


def prefill(shape: Shape, settings: Settings) -> list[dict]:
    """One row of tokens into an empty cache, only the last logits asked for; against the native model."""
    rows = []
    for name, build in PAIRS.items():
        pair = build(shape)
        for length in shape.contexts:
            ids = tokens(shape, 1, length)
            mask = torch.ones_like(ids)

            def work(model, ids=ids, mask=mask):
                @torch.inference_mode()
                def run():
                    model(ids, attention_mask=mask, use_cache=True, logits_to_keep=1)

                return Work(run)

            sides, bound = (work(pair.hybrid), work(pair.native)), pair.bound(FORWARD_BOUND)
            row = settings.compare(f"prefill, {name}, {length}", *sides, bound)
            rows.append(row | {"tokens": length})
    return rows


def projectors_of(model: PreTrainedModel) -> list[Projector]:
    """All projectors of a hybrid."""
    return [module for module in model.modules() if isinstance(module, Projector)]


def projector_work(model: PreTrainedModel, ids: torch.LongTensor, training: bool) -> Work:
    """The same projectors alone on states as they get them; in training with backward and optimizer step."""
    projectors = projectors_of(model)
    states = [torch.randn(*ids.shape, projector.in_features, requires_grad=training) for projector in projectors]
    if not training:

        @torch.inference_mode()
        def run():
            for projector, state in zip(projectors, states):
                projector(state)

        return Work(run)
    copies = [nn.Linear(projector.in_features, projector.out_features) for projector in projectors]
    slopes = [torch.randn(*ids.shape, copy.out_features) for copy in copies]
    optimizer = torch.optim.AdamW([p for copy in copies for p in copy.parameters()], lr=1e-6)

    def train():
        torch.autograd.backward([copy(state) for copy, state in zip(copies, states)], slopes)
        optimizer.step()
        optimizer.zero_grad()
        for state in states:
            state.grad = None

    return Work(train)


def training_work(model: nn.Module, ids: torch.LongTensor) -> Work:
    """Loss, backward and a step of AdamW, with a learning rate that changes next to nothing."""
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-7)

    def run():
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Work(run)


def supernet_forward(shape: Shape, settings: Settings) -> list[dict]:
    """A supernet at uniform weights, against its components run alone plus its projectors timed alone."""
    ids = tokens(shape, shape.batch, shape.length)
    return _supernet_rows("supernet forward", shape, settings, forward_work, ids, training=False)


def supernet_training(shape: Shape, settings: Settings) -> list[dict]:
    """The same for a training step."""
    ids = tokens(shape, shape.batch, shape.length)
    return _supernet_rows("supernet training step", shape, settings, training_work, ids, training=True)


def _supernet_rows(name: str, shape: Shape, settings: Settings, work: Callable, ids, training: bool) -> list[dict]:
    """Against components as transformers runs them, and (no bound is promised) with our code in Mamba layers."""
    rows = []
    for suffix, bound in SUPERNETS.items():
        model, components = supernet(shape)
        if bound is None:
            for component in components:
                use_own_scan(component)
        alone = [work(component, ids) for component in components] + [projector_work(model, ids, training)]
        rows.append(settings.compare(name + suffix, work(model, ids), alone, bound))
    return rows
