"""
The scan of Mamba-1 on a CPU: a model whose mixers have ours against the same model as transformers runs it, by its own
loop ("stock") and by the package mambapy. All take turns; "ours again" against ours is the noise of the measurement.
Ratios are those of processor time; the clock's are in the JSON too.

    steps      seconds of a training step (forward, loss, backward, AdamW) and of a forward pass
    gradients  of every parameter in float32, norm of the error over the norm, against a plain loop in float64

    pip install -e '.[bench]'
    python benchmarks/scan.py [--measures steps gradients] [--shapes small layer-of-100M] [--resume]

The loop of transformers takes minutes a step at the larger settings; --budget limits how often it takes part.
--resume keeps what `results/scan.json` has of the same options, whatever its commit, which is told beside each.
"""

import argparse
import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from unittest import mock

import torch
from _scan_timing import half_width, ratio, shown, take_turns
from _shared import RESULTS, quiet, versions, write
from _timing import commit, machine
from transformers import MambaConfig, MambaForCausalLM

from modeling_manticore import scan_manticore
from modeling_manticore.scan_manticore import selective_scan, use_own_scan


SHAPES = {
    "small": {"hidden_size": 192, "num_hidden_layers": 2},
    "layer-of-100M": {"hidden_size": 768, "num_hidden_layers": 1},
}
VOCABULARY = 2048
VARIANTS = ("ours", "ours again", "stock", "mambapy")
MEASURES = ("steps", "gradients")
GRADIENT_BOUND = 1e-5


@dataclass(frozen=True)
class Setting:
    """Sequences and tokens of a step, and how many times faster than stock it must be."""

    batch: int
    tokens: int
    bound: float

    @property
    def name(self) -> str:
        return f"B={self.batch} T={self.tokens}"


SETTINGS = (Setting(4, 128, 5), Setting(1, 512, 12), Setting(4, 512, 30))


def model_of(shape: str, variant: str) -> MambaForCausalLM:
    """A Mamba of a shape whose mixers run a variant's scan; the same weights in all."""
    torch.manual_seed(0)
    model = MambaForCausalLM(MambaConfig(**SHAPES[shape], vocab_size=VOCABULARY, use_mambapy=variant == "mambapy"))
    if variant.startswith("ours"):
        use_own_scan(model)
    return model


def text(setting: Setting) -> torch.Tensor:
    """Random token ids (batch, tokens)."""
    shape = (setting.batch, setting.tokens)
    return torch.randint(0, VOCABULARY, shape, generator=torch.Generator().manual_seed(1))


def step_of(model: MambaForCausalLM, ids: torch.Tensor) -> Callable[[], None]:
    """A training step; both kinds of runs are warmed up on the first tokens."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step(part: torch.Tensor = ids) -> None:
        model(input_ids=part, labels=part, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step(ids[:, :16])
    return step


def forward_of(model: MambaForCausalLM, ids: torch.Tensor) -> Callable[[], None]:
    """A forward pass without gradients."""

    @torch.no_grad()
    def forward(part: torch.Tensor = ids) -> None:
        model(input_ids=part, use_cache=False)

    forward(ids[:, :16])
    return forward


def steps(shape: str, setting: Setting, options: argparse.Namespace) -> dict:
    """Seconds and ratios of training steps and forward passes."""
    ids, found = text(setting), {}
    for kind, make in (("forward", forward_of), ("step", step_of)):
        runs = {variant: make(model_of(shape, variant), ids) for variant in VARIANTS}
        seconds = take_turns(runs, options.rounds, options.budget, options.least)
        found[kind] = {clock: _against(times, ids.numel()) | {"seconds": times} for clock, times in seconds.items()}
    training, forward = (found[kind]["processor"]["times_as_long_as_ours"] for kind in ("step", "forward"))
    found["bound"] = setting.bound
    found["met"] = {
        "stock": training["stock"]["interval"][0] >= setting.bound,
        "mambapy": training["mambapy"]["interval"][0] > 1,
        "forward": forward["stock"]["interval"][0] > 1 - half_width(forward["ours again"]),
    }
    return found


def _against(times: dict[str, list[float]], tokens: int) -> dict:
    return {
        "tokens_per_second": {name: tokens / median(own) for name, own in times.items()},
        "times_as_long_as_ours": {name: ratio(own, times["ours"]) for name, own in times.items() if name != "ours"},
    }


def plain_scan(hidden_states, dt, A, B, C, D, z, delta_bias=None, delta_softplus=False, return_last_state=False, **_):
    """The recurrence of the paper, token by token, in the dtype of its inputs; shapes as in `selective_scan`."""
    if delta_bias is not None:
        dt = dt + delta_bias[:, None]
    if delta_softplus:
        dt = torch.nn.functional.softplus(dt)
    state, outputs = torch.zeros_like(A), []
    for x_t, dt_t, B_t, C_t in zip(*(part.unbind(-1) for part in (hidden_states, dt, B, C))):
        state = torch.exp(dt_t[:, :, None] * A) * state + (dt_t * x_t)[:, :, None] * B_t[:, None]
        outputs.append(torch.einsum("bdn,bn->bd", state, C_t))
    y = (torch.stack(outputs, -1) + D[:, None] * hidden_states) * torch.nn.functional.silu(z)
    return (y, state) if return_last_state else y


def gradients(shape: str, setting: Setting, options: argparse.Namespace) -> dict:
    """The error of every parameter's gradient in float32, of one sequence of the setting's length."""
    ids, model = text(setting)[:1], model_of(shape, "ours")

    def found(scan: Callable, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        own = copy.deepcopy(model).to(dtype)
        with mock.patch.object(scan_manticore, "selective_scan", scan):
            own(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        return {name: parameter.grad.double() for name, parameter in own.named_parameters()}

    exact, single = found(plain_scan, torch.float64), found(selective_scan, torch.float32)
    errors = {name: ((single[name] - true).norm() / true.norm()).item() for name, true in exact.items()}
    worst = max(errors.values())
    return {"errors": errors, "worst": worst, "bound": GRADIENT_BOUND, "met": worst <= GRADIENT_BOUND}


def gradcheck() -> bool:
    """`torch.autograd.gradcheck` of the scan, with the chunks cut so that several are passed."""
    draw = torch.Generator().manual_seed(0)
    shapes = [(1, 3, 5), (1, 3, 5), (3, 2), (1, 2, 5), (1, 2, 5), (3,), (1, 3, 5), (3,)]
    given = [torch.randn(shape, generator=draw, dtype=torch.float64) for shape in shapes]
    given[2] = -given[2].exp()
    with mock.patch.object(scan_manticore, "LONGEST_CHUNK", 2):
        return torch.autograd.gradcheck(
            lambda *values: selective_scan(*values, delta_softplus=True, return_last_state=True),
            [value.requires_grad_() for value in given],
        )


def report(measure: str, shape: str, setting: Setting, found: dict) -> None:
    """Print what one setting gave."""
    print(f"{shape}, {setting.name}, {measure}:")
    if measure == "gradients":
        print(f"  worst error {found['worst']:.1e} (bound {found['bound']:.0e}: {_word(found['met'])})")
        return
    for kind in ("step", "forward"):
        taken = found[kind]["processor"]
        speeds, against = taken["tokens_per_second"], taken["times_as_long_as_ours"]
        for name in VARIANTS:
            beside = "" if name == "ours" else f"  {shown(against[name])} times ours, {against[name]['rounds']} rounds"
            print(f"  {kind:8}{name:11}{speeds[name]:10,.0f} tokens/s{beside}")
    verdicts = ", ".join(f"{name} {_word(met)}" for name, met in found["met"].items())
    print(f"  bounds ({setting.bound:g} times stock, faster than mambapy, forward not slower than stock): {verdicts}")


def _word(met: bool) -> str:
    return "met" if met else "NOT MET"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measures", nargs="+", choices=MEASURES, default=list(MEASURES))
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--settings", nargs="+", type=int, choices=range(len(SETTINGS)), default=[0, 1, 2])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--least", type=int, default=3, help="rounds that every variant takes part in")
    parser.add_argument("--budget", type=float, default=60, help="seconds of a variant, after which it stays out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="keep finished measures of results/scan.json")
    options = parser.parse_args()
    quiet()
    versions("mambapy")  # an error here and not after minutes: transformers would run its own loop silently
    torch.set_num_threads(options.threads)
    file, units = RESULTS / "scan.json", {}
    if options.resume and file.is_file():
        units = json.loads(file.read_text())["units"]
    made_with = versions("torch", "transformers", "mambapy") | {"threads": options.threads}
    for measure in options.measures:
        timing = {name: getattr(options, name) for name in ("rounds", "least", "budget")} if measure == "steps" else {}
        for shape in options.shapes:
            for setting in (SETTINGS[i] for i in options.settings):
                name, wanted = f"{measure}, {shape}, {setting.name}", made_with | timing
                if name not in units or units[name]["settings"] != wanted:
                    found = globals()[measure](shape, setting, options)
                    units[name] = {"settings": wanted, "commit": commit(), "load": machine()["load"], "result": found}
                    write("scan", {"gradcheck": gradcheck(), "shapes": SHAPES, "units": units})
                report(measure, shape, setting, units[name]["result"])


if __name__ == "__main__":
    main()
