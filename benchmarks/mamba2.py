"""
Mamba-2 on a CPU: a model whose mixers have our scan, convolution and one-token update against the same model as
transformers runs it ("stock"). All take turns; "ours again" against ours is the noise of the measurement. Ratios are
those of processor time; the clock's are in the JSON too.

    step       a training step (forward, loss, backward, AdamW)
    forward    a forward pass
    decode     tokens one by one with a cache, after a prompt
    gradients  of every parameter in float32, norm of the error over the norm, against a plain loop in float64

    python benchmarks/mamba2.py [--measures step forward decode gradients] [--shapes small layer-of-130M]
"""

import argparse
from collections.abc import Callable
from statistics import median
from unittest import mock

import torch
from _scan_timing import half_width, ratio, shown, take_turns
from _shared import quiet, versions, write
from _timing import commit, machine
from transformers import Mamba2Config, Mamba2ForCausalLM
from transformers.models.mamba2 import modeling_mamba2

from modeling_manticore.scan_manticore import use_own_scan


SHAPES = {
    "small": {
        "hidden_size": 192,
        "num_hidden_layers": 2,
        "num_heads": 12,
        "head_dim": 32,
        "state_size": 32,
        "chunk_size": 32,
    },
    "layer-of-130M": {
        "hidden_size": 768,
        "num_hidden_layers": 1,
        "num_heads": 24,
        "head_dim": 64,
        "state_size": 128,
        "chunk_size": 256,
    },
}
VOCABULARY = 2048
SETTINGS = ((4, 128), (1, 512), (4, 512))
VARIANTS = ("ours", "ours again", "stock")
MEASURES = ("step", "forward", "decode", "gradients")
GRADIENT_BOUND = 1e-5
PROMPT, DECODED = 32, 16


def model_of(shape: str, variant: str) -> Mamba2ForCausalLM:
    """A Mamba-2 of a shape whose mixers run a variant's code; the same weights in all."""
    torch.manual_seed(0)
    model = Mamba2ForCausalLM(Mamba2Config(**SHAPES[shape], n_groups=1, vocab_size=VOCABULARY))
    if variant.startswith("ours"):
        use_own_scan(model)
    return model


def text(batch: int, tokens: int) -> torch.Tensor:
    """Random token ids (batch, tokens)."""
    return torch.randint(0, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(1))


def step_of(model: Mamba2ForCausalLM, ids: torch.Tensor) -> Callable[[], None]:
    """A training step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def forward_of(model: Mamba2ForCausalLM, ids: torch.Tensor) -> Callable[[], None]:
    """A forward pass without gradients."""

    @torch.no_grad()
    def forward() -> None:
        model(input_ids=ids, use_cache=False)

    return forward


def decode_of(model: Mamba2ForCausalLM, ids: torch.Tensor) -> Callable[[], None]:
    """Tokens of every row one by one."""
    with torch.no_grad():
        cache = model(input_ids=ids[:, :PROMPT], use_cache=True).cache_params

    @torch.no_grad()
    def decode() -> None:
        for t in range(DECODED):
            model(input_ids=ids[:, t : t + 1], cache_params=cache, use_cache=True)

    return decode


MAKERS = {"step": step_of, "forward": forward_of, "decode": decode_of}


def times(measure: str, shape: str, ids: torch.Tensor, options: argparse.Namespace) -> dict:
    """Seconds of every variant, and how many times as long as ours the others take."""
    runs = {variant: MAKERS[measure](model_of(shape, variant), ids) for variant in VARIANTS}
    for run in runs.values():
        run()
    tokens = ids.shape[0] * (DECODED if measure == "decode" else ids.shape[1])
    found = {}
    for clock, seconds in take_turns(runs, options.rounds, options.budget).items():
        found[clock] = {
            "tokens_per_second": {name: tokens / median(own) for name, own in seconds.items()},
            "times_as_long_as_ours": {
                name: ratio(own, seconds["ours"]) for name, own in seconds.items() if name != "ours"
            },
            "seconds": seconds,
        }
    against = found["processor"]["times_as_long_as_ours"]
    return found | {"met": against["stock"]["interval"][0] > 1 - half_width(against["ours again"])}


def plain_scan(hidden_states, dt, A, B, C, D, dt_bias, chunk_size=None, **_):
    """The recurrence of the paper, token by token, in the dtype of its inputs; shapes as in `chunk_scan`."""
    steps = torch.nn.functional.softplus(dt + dt_bias)
    heads = hidden_states.shape[2]
    B, C = (part.repeat_interleave(heads // part.shape[2], dim=2) for part in (B, C))
    state, outputs = 0, []
    for x_t, dt_t, B_t, C_t in zip(*(part.unbind(1) for part in (hidden_states, steps, B, C))):
        state = torch.exp(dt_t * A)[..., None, None] * state + (dt_t[..., None] * x_t)[..., None] * B_t[:, :, None]
        outputs.append((state @ C_t[..., None])[..., 0] + D[:, None] * x_t)
    return torch.stack(outputs, 1)


def gradients(shape: str, ids: torch.Tensor) -> dict:
    """The error of every parameter's gradient in float32, ours and stock, of the first row."""
    ids = ids[:1]

    def found(model: Mamba2ForCausalLM) -> dict[str, torch.Tensor]:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {name: parameter.grad.double() for name, parameter in model.named_parameters()}

    with mock.patch.object(modeling_mamba2, "mamba2_chunk_scan", plain_scan):
        exact = found(model_of(shape, "stock").double())
    worst = {}
    for variant in ("ours", "stock"):
        single = found(model_of(shape, variant))
        worst[variant] = max(((single[name] - true).norm() / true.norm()).item() for name, true in exact.items())
    return {"worst": worst, "bound": GRADIENT_BOUND, "met": worst["ours"] <= GRADIENT_BOUND}


def report(measure: str, found: dict) -> None:
    """Print what one setting gave."""
    word = "met" if found["met"] else "NOT MET"
    if measure == "gradients":
        errors = ", ".join(f"{name} {error:.1e}" for name, error in found["worst"].items())
        print(f"  {measure:10} worst error {errors} (bound {found['bound']:.0e}: {word})")
        return
    taken = found["processor"]
    against = ", ".join(f"{name} {shown(part)}" for name, part in taken["times_as_long_as_ours"].items())
    speeds = taken["tokens_per_second"]
    print(
        f"  {measure:10} {speeds['ours']:9,.0f} tokens/s, stock {speeds['stock']:9,.0f}; times ours: {against}: {word}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--budget", type=float, default=20, help="seconds of a variant, after which it stays out")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(options.threads)
    units = {}
    for shape in options.shapes:
        for batch, tokens in SETTINGS:
            print(f"{shape}, B={batch} T={tokens}")
            ids = text(batch, tokens)
            for measure in options.measures:
                found = gradients(shape, ids) if measure == "gradients" else times(measure, shape, ids, options)
                units[f"{measure}, {shape}, B={batch} T={tokens}"] = found
                report(measure, found)
    about = {"commit": commit(), "load": machine()["load"], "threads": options.threads, "shapes": SHAPES}
    write("mamba2", about | {"versions": versions("torch", "transformers"), "units": units})


if __name__ == "__main__":
    main()
