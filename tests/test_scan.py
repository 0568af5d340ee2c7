"""The CPU scan of Mamba-1 against a plain float64 recurrence, against the families' own, and where it is used."""

import copy
import inspect
import pickle

import pytest
import torch
from tiny import component, tokens

from modeling_manticore import ManticoreForCausalLM, discretize, scan_manticore
from modeling_manticore.scan_manticore import FAMILY_SCAN, selective_scan


FAMILIES = ("mamba", "falcon_mamba", "jamba")
NAMES = ("hidden_states", "dt", "A", "B", "C", "D", "z", "delta_bias", "initial_state")


def inputs(tokens: int, dtype=torch.float64, batch: int = 2, channels: int = 6, state: int = 4) -> dict:
    draw = torch.Generator().manual_seed(tokens)
    shapes = {"hidden_states": (batch, channels, tokens), "dt": (batch, channels, tokens), "A": (channels, state)}
    shapes |= {"B": (batch, state, tokens), "C": (batch, state, tokens), "D": (channels,)}
    shapes |= {"z": (batch, channels, tokens), "delta_bias": (channels,), "initial_state": (batch, channels, state)}
    made = {name: torch.randn(shapes[name], generator=draw, dtype=torch.float64) for name in NAMES}
    made["A"] = -made["A"].exp()
    return {name: value.to(dtype).requires_grad_() for name, value in made.items()}


def plain(hidden_states, dt, A, B, C, D, z, delta_bias, initial_state):
    """The recurrence, token by token, in float64."""
    x, dt, A, B, C, D, z, bias, h = (
        part.double() for part in (hidden_states, dt, A, B, C, D, z, delta_bias, initial_state)
    )
    dt, outputs = torch.log1p(torch.exp(dt + bias[:, None])), []
    for t in range(x.shape[-1]):
        step = dt[:, :, t, None]
        h = torch.exp(step * A) * h + step * B[:, None, :, t] * x[:, :, t, None]
        y = (h * C[:, None, :, t]).sum(-1) + D * x[:, :, t]
        outputs.append(y * z[:, :, t] * torch.sigmoid(z[:, :, t]))
    return torch.stack(outputs, -1), h


def ours(given: dict):
    return selective_scan(**given, delta_softplus=True, return_last_state=True)


def gradients(outputs, given: dict) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    total = sum((o * torch.randn(o.shape, generator=draw, dtype=torch.float64).to(o.dtype)).sum() for o in outputs)
    return torch.autograd.grad(total, list(given.values()))


def worst(found, expected) -> float:
    return max(((f.double() - e).norm() / e.norm()).item() for f, e in zip(found, expected, strict=True))


@pytest.mark.parametrize("count", [1, 5, 64, 65, 150])
def test_values_and_gradients_of_float32(count):
    single, double = inputs(count, torch.float32), inputs(count)
    found, expected = ours(single), plain(**double)
    assert found[0].dtype == found[1].dtype == torch.float32
    assert worst(found, expected) < 1e-6
    assert worst(gradients(found, single), gradients(expected, double)) < 1e-6


@pytest.mark.parametrize("longest", [1, 2, 64])
def test_gradcheck(monkeypatch, longest):
    monkeypatch.setattr(scan_manticore, "LONGEST_CHUNK", longest)
    given = inputs(5, batch=1, channels=3, state=2)
    assert torch.autograd.gradcheck(lambda *values: ours(dict(zip(NAMES, values))), tuple(given.values()))


def test_large_inputs_are_cut_into_small_chunks(monkeypatch):
    given = inputs(30)
    expected = ours(given)
    monkeypatch.setattr(scan_manticore, "CACHED_NUMBERS", 2 * 6 * 4 * 7)  # seven tokens a chunk, the last of two
    assert worst(ours(given), expected) < 1e-15


def test_a_text_in_two_parts():
    given = inputs(20)
    y, last = ours(given)
    timed = ("hidden_states", "dt", "B", "C", "z")
    first = {name: value[..., :13] if name in timed else value for name, value in given.items()}
    second = {name: value[..., 13:] if name in timed else value for name, value in given.items()}
    y_first, middle = ours(first)
    y_second, end = ours(second | {"initial_state": middle})
    torch.testing.assert_close(torch.cat([y_first, y_second], -1), y, atol=1e-13, rtol=0)
    torch.testing.assert_close(end, last, atol=1e-13, rtol=0)


def test_half_precision_has_float32_states():
    given = {name: value.detach().bfloat16() for name, value in inputs(40).items()}
    y, last = ours(given)
    exact_y, exact_last = plain(**given)
    assert last.dtype == torch.float32 and worst([last], [exact_last]) < 0.01 and worst([y], [exact_y]) < 0.01


def test_autocast_does_not_reach_the_sums():
    single, double = inputs(40, torch.float32), inputs(40)
    with torch.autocast("cpu", torch.bfloat16):
        found = ours(single)
        grads = gradients(found, single)
    assert worst(found, plain(**double)) < 1e-6 and worst(grads, gradients(plain(**double), double)) < 1e-6


@pytest.mark.parametrize("family", FAMILIES)
def test_the_familys_own_scan_agrees(family):
    given = {name: value for name, value in inputs(70, torch.float32).items() if name != "initial_state"}
    module = inspect.getmodule(type(component(family, 0)))
    theirs = getattr(module, FAMILY_SCAN)(**given, delta_softplus=True, return_last_state=True)
    found = ours(given)
    assert worst(found, [t.double() for t in theirs]) < 1e-6
    assert worst(gradients(found, given), [g.double() for g in gradients(theirs, given)]) < 1e-6


def mixers(model) -> list:
    return [m for m in model.modules() if FAMILY_SCAN in _names(type(m))]


def _names(kind: type) -> tuple:
    return getattr(getattr(inspect.unwrap(kind.forward), "__code__", None), "co_names", ())


def counted(monkeypatch) -> list:
    calls = []

    def counting(*args, **kwargs):
        calls.append(1)
        return selective_scan(*args, **kwargs)

    monkeypatch.setattr(scan_manticore, "selective_scan", counting)
    return calls


@pytest.mark.parametrize("family", FAMILIES)
def test_hybrids_use_it_and_nobody_else(family, monkeypatch):
    calls, alone = counted(monkeypatch), component(family, 0)
    theirs = [type(mixer) for mixer in mixers(alone)]
    model = discretize(ManticoreForCausalLM.from_components([alone, component("gpt2", 1)], num_blocks=2), [0, 0])
    own = mixers(model)
    assert own and all(type(m).__mro__[1] in theirs and m.forward.__func__ is type(m).forward for m in own)
    with torch.no_grad():
        expected = alone(tokens()).logits
        assert not calls and [type(mixer) for mixer in mixers(alone)] == theirs
        torch.testing.assert_close(model(tokens()).logits, expected, atol=1e-5, rtol=0)
    assert len(calls) == len(own)


def test_without_it_when_the_kernels_are_installed(monkeypatch):
    monkeypatch.setattr(scan_manticore.importlib.util, "find_spec", lambda name: name == "mamba_ssm" or None)
    model = ManticoreForCausalLM.from_components([component("mamba", 0), component("gpt2", 1)], num_blocks=2)
    assert all(type(m).__module__.startswith("transformers.") for m in mixers(model))


def test_mambapy_is_left_to_the_family(monkeypatch):
    calls, asked = counted(monkeypatch), component("mamba", 0)
    asked.config.use_mambapy = True  # falls back to the family's loop where the package is absent
    model = discretize(ManticoreForCausalLM.from_components([asked, component("gpt2", 1)], num_blocks=2), [0, 0])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, asked(tokens()).logits, atol=1e-5, rtol=0)
    assert not calls


def test_copies_and_pickles_keep_it(monkeypatch):
    model = ManticoreForCausalLM.from_components([component("mamba", 0), component("gpt2", 1)], num_blocks=2)
    expected, calls = model(tokens()).logits, counted(monkeypatch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert {type(m) for m in mixers(other)} == {type(m) for m in mixers(model)}
        del calls[:]
        assert torch.equal(other(tokens()).logits, expected) and len(calls) == len(mixers(other))
