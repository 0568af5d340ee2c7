"""Speed of generating token by token from a cache, against the native model and against the context's length."""

import copy
import inspect
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from _speed_forward import PAIRS, Settings
from _speed_shapes import Caches, Pair, PlainLoop, Shape, tokens, two_states
from _timing import Work, ratio_of, take_turns
from torch import nn
from transformers.cache_utils import Cache, DynamicLayer

from modeling_manticore.cache_manticore import cache_growth


DECODE_BOUND = 1.08
CONSTANT_WITHIN = 0.10
WIDE = 16
COMPILED = ("one slice", "half and half", "one-layer slices", "alternating slices")


@dataclass
class Decoder:
    """A model with a filled cache: `work` goes on from a copy of that cache, `steps` tokens."""

    model: nn.Module
    ids: torch.LongTensor
    cache: Cache | Caches
    steps: int

    @classmethod
    def filled(cls, model: nn.Module, ids: torch.LongTensor, steps: int) -> "Decoder":
        """Prefill all but the last `steps` tokens of (batch, tokens)."""
        given = ids[:, :-steps]
        with torch.inference_mode():
            output = model(given, attention_mask=torch.ones_like(given), use_cache=True, logits_to_keep=1)
        cache = output.cache_params if hasattr(output, "cache_params") else output.past_key_values
        return cls(model, ids, cache, steps)

    def decode(self, cache: Cache | Caches) -> torch.Tensor:
        """The steps, as `generate` calls a model: a mask of all tokens where the family takes one. Last logits."""
        recurrent = "cache_params" in inspect.signature(self.model.forward).parameters
        name, start = "cache_params" if recurrent else "past_key_values", self.ids.shape[1] - self.steps
        mask = torch.ones_like(self.ids)
        for now in range(start, start + self.steps):
            seen = None if recurrent else mask[:, : now + 1]
            output = self.model(
                self.ids[:, now : now + 1], attention_mask=seen, use_cache=True, logits_to_keep=1, **{name: cache}
            )
        return output.logits

    def work(self) -> Work:
        """The timed steps; copying the cache is not timed. Copies are of one kind, for graphs that ask which."""
        within = torch.inference_mode()
        return Work(within(self.decode), lambda: within(copy.deepcopy)(self.cache))


def pair_of_decoders(pair: Pair, ids: torch.LongTensor, steps: int) -> tuple[Decoder, Decoder, float]:
    """
    The hybrid and the native model behind the same prefix, and how far their last logits differ.

    Raises:
        RuntimeError: they are not the same function.
    """
    ours, native = (Decoder.filled(model, ids, steps) for model in (pair.hybrid, pair.native))
    with torch.inference_mode():
        last = [decoder.decode(copy.deepcopy(decoder.cache)) for decoder in (ours, native)]
    difference = (last[0] - last[1]).abs().max().item()
    if pair.is_same and not difference < 1e-3:
        raise RuntimeError(f"the hybrid and the native model of its layers differ by {difference} after decoding")
    return ours, native, difference


def decode(shape: Shape, settings: Settings) -> list[dict]:
    """Milliseconds per token of the hybrid, and its ratio to the native model, at each context and batch."""
    rows = []
    for name, build in PAIRS.items():
        pair = build(shape)
        for batch, contexts in ((1, shape.contexts), (WIDE, shape.wide_contexts)):
            rows += [_row(pair, name, batch, context, shape, settings) for context in contexts]
    return rows


def _row(pair: Pair, name: str, batch: int, context: int, shape: Shape, settings: Settings) -> dict:
    ours, native, difference = pair_of_decoders(pair, tokens(shape, batch, context + shape.steps), shape.steps)
    bound = pair.bound(DECODE_BOUND)
    row = settings.compare(
        f"decode, {name}, batch {batch}, {context}", ours.work(), native.work(), bound, tokens=context
    )
    fixed = (row["seconds"] - row["reference_seconds"]) / shape.steps / pair.slices * 1e3
    return row | {
        "logits_differ_by": difference,
        "series": f"{name}, batch {batch}",
        "milliseconds_per_token": row["seconds"] / shape.steps * 1e3,
        "native_milliseconds_per_token": row["reference_seconds"] / shape.steps * 1e3,
        "extra_milliseconds_per_token_and_slice": fixed,
        "cache_bytes_per_token": key_value_bytes(pair, batch, ours, shape) if pair.has_attention else 0,
    }


def key_value_bytes(pair: Pair, batch: int, decoder: Decoder, shape: Shape) -> int:
    """
    Key and value bytes that one token of one row adds to the hybrid's cache, counted on its tensors.

    Raises:
        RuntimeError: they are not those of the native model's attention layers.
    """
    native = pair.native.kinds.count("attention") if isinstance(pair.native, PlainLoop) else shape.layers
    layers = [layer for layer in decoder.cache.layers if isinstance(layer, DynamicLayer)]
    bytes_held = sum(part.nbytes for layer in layers for part in (layer.keys, layer.values))
    found, rest = divmod(bytes_held, batch * layers[0].keys.shape[-2])
    due = native * 2 * shape.width * pair.hybrid.dtype.itemsize
    said = cache_growth(pair.hybrid.config, pair.hybrid.dtype.itemsize)
    if rest or found != due or said != due:
        raise RuntimeError(f"key-value bytes per token: counted {found}, described {said}, those of the layers {due}")
    return found


def decode_of_states(shape: Shape, settings: Settings) -> list[dict]:
    """
    A hybrid without attention: time per token at every context over that at the shortest. All contexts take turns in
    one run; no row has a native reference, A/A is the shortest context against itself.
    """
    pair = two_states(shape)
    contexts = shape.state_contexts
    decoders = {n: Decoder.filled(pair.hybrid, tokens(shape, 1, n + shape.steps), shape.steps) for n in contexts}
    works = {str(n): decoder.work() for n, decoder in decoders.items()} | {"again": decoders[contexts[0]].work()}
    taken = take_turns(works, settings.seconds * len(contexts), fewest=settings.fewest)
    rows = []
    for n in contexts[1:]:
        ratios = {
            clock: ratio_of(samples[str(n)], samples[str(contexts[0])], samples["again"])
            for clock, samples in taken.items()
        }
        found = ratios[settings.clock]
        row = {"name": f"decode without attention, {n} over {contexts[0]}"} | found.row(1 + CONSTANT_WITHIN)
        row["fails"] = row["fails"] or found.high < 1 - CONSTANT_WITHIN
        row["met"] = row["met"] and found.low > 1 - CONSTANT_WITHIN - found.noise
        row["clocks"] = {c: {"ratio": r.ratio, "interval": [r.low, r.high]} for c, r in ratios.items()}
        row |= {"tokens": n, "series": "without attention, batch 1"}
        rows.append(row | {"milliseconds_per_token": found.seconds / shape.steps * 1e3})
    first = rows[0]["reference_seconds"] / shape.steps * 1e3
    start = {"name": f"decode without attention, {contexts[0]}", "tokens": contexts[0]}
    return [start | {"series": "without attention, batch 1", "milliseconds_per_token": first}, *rows]


def compiled_decode(shape: Shape, settings: Settings) -> list[dict]:
    """
    Decoding with `torch.compile`, one row behind the shortest context: the compiled hybrid against itself as it is,
    and against the native model, compiled, too. Prefill is not compiled; compiling is not timed, and reported beside.
    """
    rows = []
    for name in COMPILED:
        torch._dynamo.reset()  # graphs of all pairs count against one limit
        pair = PAIRS[name](shape)
        ids = tokens(shape, 1, shape.contexts[0] + shape.steps)
        ours, native, difference = pair_of_decoders(pair, ids, shape.steps)
        compiled = {"hybrid": _compiled(ours), "native": _compiled(native)}
        fast, took = compiled["hybrid"]
        more = {"compiling_seconds": took, "logits_differ_by": difference, "tokens": shape.contexts[0]}
        for reference, decoder in (("itself", ours), ("native, compiled", compiled["native"][0])):
            row_name = f"compiled decode, {name}, over {reference}"
            rows.append(settings.compare(row_name, fast.work(), decoder.work(), **more))
    return rows


def _compiled(decoder: Decoder) -> tuple[Decoder, float]:
    """
    The same with a compiled model, and the seconds that compiling took.

    Raises:
        RuntimeError: the compiled model is another function.
    """
    fast = replace(decoder, model=torch.compile(decoder.model))
    with torch.inference_mode():
        expected, cache = decoder.decode(copy.deepcopy(decoder.cache)), copy.deepcopy(decoder.cache)
        began = time.perf_counter()
        found = fast.decode(cache)
        took = time.perf_counter() - began
    if not (found - expected).abs().max() < 1e-3:
        raise RuntimeError(f"compiled, the logits differ by {(found - expected).abs().max().item()}")
    return fast, took


DECODING: dict[str, Callable] = {
    "decode": decode,
    "decode of states": decode_of_states,
    "compiled decode": compiled_decode,
}
