"""The CPU scans against a plain float64 recurrence, against the families' own, and where they are used."""

import copy
import inspect
import pickle

import pytest
import torch
from tiny import component, tokens

from modeling_manticore import ManticoreForCausalLM, chunk_scan_manticore, discretize, scan_manticore
from modeling_manticore.chunk_scan_manticore import chunk_scan, state_update
from modeling_manticore.scan_manticore import OF_ONE_TOKEN, OWN, causal_conv, conv_update, selective_scan


MAMBA_1, MAMBA_2 = "mamba_selective_scan", "mamba2_chunk_scan"
SCANS = {"mamba": MAMBA_1, "falcon_mamba": MAMBA_1, "jamba": MAMBA_1}
SCANS |= dict.fromkeys(("mamba2", "bamba", "falcon_h1", "nemotron_h", "granitemoehybrid"), MAMBA_2)
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


CHUNKED = ("hidden_states", "dt", "A", "B", "C", "D", "dt_bias", "initial_states")


def chunked_inputs(tokens: int, dtype=torch.float64, heads: int = 4, channels: int = 3, groups: int = 2) -> dict:
    draw, batch, state = torch.Generator().manual_seed(tokens), 2, 5
    shapes = {"hidden_states": (batch, tokens, heads, channels), "dt": (batch, tokens, heads), "A": (heads,)}
    shapes |= {"B": (batch, tokens, groups, state), "C": (batch, tokens, groups, state), "D": (heads,)}
    shapes |= {"dt_bias": (heads,), "initial_states": (batch, heads, channels, state)}
    made = {name: torch.randn(shapes[name], generator=draw, dtype=torch.float64) for name in CHUNKED}
    made["A"] = -made["A"].exp()
    return {name: value.to(dtype).requires_grad_() for name, value in made.items()}


def plain_chunked(hidden_states, dt, A, B, C, D, dt_bias, initial_states):
    """The recurrence, token by token, in float64."""
    x, dt, A, B, C, D, bias, h = (part.double() for part in (hidden_states, dt, A, B, C, D, dt_bias, initial_states))
    dt, outputs = torch.log1p(torch.exp(dt + bias)), []
    B, C = (part.repeat_interleave(x.shape[2] // part.shape[2], dim=2) for part in (B, C))
    for t in range(x.shape[1]):
        step = dt[:, t, :, None, None]
        h = torch.exp(step * A[:, None, None]) * h + step * x[:, t, :, :, None] * B[:, t, :, None, :]
        outputs.append((h * C[:, t, :, None, :]).sum(-1) + D[:, None] * x[:, t])
    return torch.stack(outputs, 1), h


def ours_chunked(given: dict):
    return chunk_scan(**given, dt_softplus=True, return_final_states=True)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("count", [1, 5, 32, 33, 150])
def test_mamba2_values_and_gradients_of_float32(count, groups):
    single, double = (chunked_inputs(count, dtype, groups=groups) for dtype in (torch.float32, torch.float64))
    found, expected = ours_chunked(single), plain_chunked(**double)
    assert found[0].dtype == found[1].dtype == torch.float32
    assert worst(found, expected) < 1e-6
    assert worst(gradients(found, single), gradients(expected, double)) < 1e-6


def test_mamba2_with_a_decay_that_forgets_at_once():
    single, double = chunked_inputs(100, torch.float32), chunked_inputs(100)
    for given in (single, double):
        with torch.no_grad():
            given["A"] *= 50  # sums over a chunk of about -2,000
    assert worst(ours_chunked(single), plain_chunked(**double)) < 1e-6


@pytest.mark.parametrize("chunk, numbers", [(2, 10**9), (3, 1), (3, 150), (32, 10**9)])
def test_mamba2_gradcheck(monkeypatch, chunk, numbers):
    monkeypatch.setattr(chunk_scan_manticore, "CHUNK", chunk)
    monkeypatch.setattr(chunk_scan_manticore, "NUMBERS", numbers)
    given = chunked_inputs(11, heads=2, channels=2)
    assert torch.autograd.gradcheck(lambda *v: ours_chunked(dict(zip(CHUNKED, v))), tuple(given.values()))
    stateless = tuple(value for name, value in given.items() if name != "initial_states")

    def alone(*values: torch.Tensor) -> torch.Tensor:
        return chunk_scan(**dict(zip(CHUNKED, values)), dt_softplus=True)

    assert torch.autograd.gradcheck(alone, stateless)
    zeros = given | {"initial_states": torch.zeros_like(given["initial_states"])}
    torch.testing.assert_close(alone(*stateless), plain_chunked(**zeros)[0], atol=1e-12, rtol=0)


def test_mamba2_a_text_in_two_parts():
    given = chunked_inputs(50)
    y, last = ours_chunked(given)
    timed = ("hidden_states", "dt", "B", "C")
    first = {name: value[:, :37] if name in timed else value for name, value in given.items()}
    second = {name: value[:, 37:] if name in timed else value for name, value in given.items()}
    y_first, middle = ours_chunked(first)
    y_second, end = ours_chunked(second | {"initial_states": middle})
    assert y.is_contiguous() and last.is_contiguous()
    torch.testing.assert_close(torch.cat([y_first, y_second], 1), y, atol=1e-13, rtol=0)
    torch.testing.assert_close(end, last, atol=1e-13, rtol=0)


def test_mamba2_half_precision_and_autocast():
    given = {name: value.detach().bfloat16() for name, value in chunked_inputs(40).items()}
    found = ours_chunked(given)
    assert found[1].dtype == torch.float32 and worst(found, plain_chunked(**given)) < 0.01
    single, double = chunked_inputs(40, torch.float32), chunked_inputs(40)
    with torch.autocast("cpu", torch.bfloat16):
        found = ours_chunked(single)
        grads = gradients(found, single)
    expected = plain_chunked(**double)
    assert worst(found, expected) < 1e-6 and worst(grads, gradients(expected, double)) < 1e-6


def test_mamba2_limits_of_the_time_step():
    given = chunked_inputs(20)
    limited = chunk_scan(**given, dt_softplus=True, dt_limit=(0.1, 0.5))
    steps = torch.nn.functional.softplus(given["dt"] + given["dt_bias"]).clamp(0.1, 0.5)
    again = chunk_scan(**given | {"dt": steps, "dt_bias": None})
    torch.testing.assert_close(limited, again, atol=1e-13, rtol=0)


def conv_inputs(tokens: int, dtype=torch.float64) -> tuple:
    draw = torch.Generator().manual_seed(tokens)
    shapes = ((2, 6, tokens), (6, 4), (6,))
    return tuple(torch.randn(s, generator=draw, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes)


@pytest.mark.parametrize("activation", [None, "silu", "gelu"])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 50])
def test_convolutions_against_the_familys(count, activation):
    theirs = inspect.getmodule(type(component("mamba2", 0))).causal_conv1d_fn
    given = conv_inputs(count, torch.float32)
    named = dict(zip(("hidden_states", "weight", "bias"), given))
    found, expected = (function(*given, activation) for function in (causal_conv, theirs))
    assert found.shape == expected.shape and worst([found], [expected.double()]) < 1e-6
    exact = [g.double() for g in gradients([expected], named)]
    assert worst(gradients([found], named), exact) < 1e-6
    torch.testing.assert_close(causal_conv(*given[:2]), theirs(*given[:2]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("count", [2, 7])
def test_convolutions_gradcheck(count, activation):
    assert torch.autograd.gradcheck(lambda *values: causal_conv(*values, activation), conv_inputs(count))


def test_convolutions_of_half_precision_and_of_a_cut():
    exact, half = conv_inputs(30), conv_inputs(30, torch.bfloat16)
    found = causal_conv(*half, "silu")
    assert found.dtype == torch.bfloat16 and worst([found], [causal_conv(*exact, "silu")]) < 0.01
    wide = torch.randn(2, 30, 20, dtype=torch.float64)
    cut = wide[..., 3:9].transpose(1, 2)  # as families cut it out of a projection
    torch.testing.assert_close(causal_conv(cut, *exact[1:]), causal_conv(cut.contiguous(), *exact[1:]), atol=0, rtol=0)


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("activation", [None, "silu", "gelu"])
@torch.no_grad()
def test_convolutions_of_one_token(activation, dtype, bound):
    hidden_states, weight, bias = conv_inputs(20, dtype)
    state = torch.zeros(2, 6, 4, dtype=dtype)
    for t in range(20):
        token = hidden_states[..., t : t + 1]
        expected = causal_conv(hidden_states[..., : t + 1].double(), weight.double(), bias.double(), activation)
        found = conv_update(token, state, weight, bias, activation)
        assert found.dtype == dtype and found.shape == token.shape
        assert (found[..., 0] - expected[..., -1]).norm() <= bound * expected[..., -1].norm()
    assert torch.equal(state, hidden_states[..., -4:])


@pytest.mark.parametrize("groups", [1, 2])
@torch.no_grad()
def test_mamba2_token_by_token(groups):
    given = chunked_inputs(12, torch.float32, groups=groups)
    heads, channels = given["hidden_states"].shape[2:]
    state = given["initial_states"].clone()
    shared = {"A": given["A"][:, None, None].expand(-1, channels, 5), "D": given["D"][:, None].expand(-1, channels)}
    shared |= {"dt_bias": given["dt_bias"][:, None].expand(-1, channels), "dt_softplus": True}
    outputs = []
    for t in range(12):
        now = {name: given[name][:, t] for name in ("hidden_states", "B", "C")}
        outputs.append(state_update(state, dt=given["dt"][:, t, :, None].expand(-1, -1, channels), **now, **shared))
    double = chunked_inputs(12, groups=groups)
    assert worst((torch.stack(outputs, 1), state), plain_chunked(**double)) < 1e-6
    gate, before = torch.randn(2, heads, channels), state.clone()
    plain, gated = (
        state_update(before.clone(), dt=given["dt"][:, t, :, None], z=z, **now, **shared) for z in (None, gate)
    )
    torch.testing.assert_close(gated, plain * gate * torch.sigmoid(gate))


@pytest.mark.parametrize("family", SCANS)
def test_the_familys_own_scan_agrees(family):
    theirs = getattr(inspect.getmodule(type(component(family, 0))), SCANS[family])
    if SCANS[family] == MAMBA_2:
        given = chunked_inputs(70, torch.float32)
        theirs = theirs(**given, chunk_size=16, dt_softplus=True, return_final_states=True)
        found = ours_chunked(given)
    else:
        given = {name: value for name, value in inputs(70, torch.float32).items() if name != "initial_state"}
        theirs = theirs(**given, delta_softplus=True, return_last_state=True)
        found = ours(given)
    assert worst(found, [t.double() for t in theirs]) < 1e-6
    assert worst(gradients(found, given), [g.double() for g in gradients(theirs, given)]) < 1e-6


def mixers(model) -> list:
    return [m for m in model.modules() if not OWN.keys().isdisjoint(_names(type(m)))]


def _names(kind: type) -> tuple:
    return getattr(getattr(inspect.unwrap(kind.forward), "__code__", None), "co_names", ())


def counted(monkeypatch) -> list:
    calls = []

    def counting(own):
        def scan(*args, **kwargs):
            calls.append(1)
            return own(*args, **kwargs)

        return scan

    for own in (selective_scan, chunk_scan, causal_conv, conv_update, state_update):
        monkeypatch.setattr(scan_manticore, own.__name__, counting(own))
    return calls


@pytest.mark.parametrize("family", SCANS)
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
        assert len(calls) == len(own) * of_many_tokens(family)
        cache = model(tokens(), use_cache=True).past_key_values
        del calls[:]
        model(tokens(length=1), past_key_values=cache)
        assert len(calls) == len(own) * (len(OWN[SCANS[family]]) - of_many_tokens(family))


def of_many_tokens(family: str) -> int:
    return len(set(OWN[SCANS[family]].values()) - set(OF_ONE_TOKEN))


def test_one_token_with_gradients_is_left_to_the_family(monkeypatch):
    calls, alone = counted(monkeypatch), component("mamba2", 0)
    model = discretize(ManticoreForCausalLM.from_components([alone, component("gpt2", 1)], num_blocks=2), [0, 0])
    with torch.no_grad():
        cache = model(tokens(), use_cache=True).past_key_values
    del calls[:]
    logits = model(tokens(length=1), past_key_values=cache).logits
    assert not calls and logits.requires_grad


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_without_it_when_the_kernels_are_installed(family, monkeypatch):
    monkeypatch.setattr(scan_manticore.importlib.util, "find_spec", lambda name: name == "mamba_ssm" or None)
    model = ManticoreForCausalLM.from_components([component(family, 0), component("gpt2", 1)], num_blocks=2)
    assert all(type(m).__module__.startswith("transformers.") for m in mixers(model))


def test_mambapy_is_left_to_the_family(monkeypatch):
    calls, asked = counted(monkeypatch), component("mamba", 0)
    asked.config.use_mambapy = True  # falls back to the family's loop where the package is absent
    model = discretize(ManticoreForCausalLM.from_components([asked, component("gpt2", 1)], num_blocks=2), [0, 0])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens()).logits, asked(tokens()).logits, atol=1e-5, rtol=0)
    assert not calls


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_copies_and_pickles_keep_it(family, monkeypatch):
    model = ManticoreForCausalLM.from_components([component(family, 0), component("gpt2", 1)], num_blocks=2)
    expected, calls = model(tokens()).logits, counted(monkeypatch)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert {type(m) for m in mixers(other)} == {type(m) for m in mixers(model)}
        del calls[:]
        assert torch.equal(other(tokens()).logits, expected)
        assert len(calls) == of_many_tokens(family) * len(mixers(other))


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_transforms_are_left_to_the_family(family, monkeypatch):
    model = ManticoreForCausalLM.from_components([component(family, 0), component("gpt2", 1)], num_blocks=2)
    model = discretize(model, [0, 1])
    model.set_attn_implementation("eager")
    calls, name = counted(monkeypatch), next(name for name, _ in model.named_parameters() if name.endswith("A_log"))
    value = model.get_parameter(name).detach()
    tangent = torch.ones_like(value)

    def loss(value: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, {name: value}, (tokens(),), {"labels": tokens()}).loss

    _, forward = torch.func.jvp(loss, (value,), (tangent,))
    with torch.autograd.forward_ad.dual_level():
        dual = loss(torch.autograd.forward_ad.make_dual(value, tangent))
        again = torch.autograd.forward_ad.unpack_dual(dual).tangent
    assert not calls
    given = value.requires_grad_()
    (backward,) = torch.autograd.grad(loss(given), given)
    assert calls
    torch.testing.assert_close(forward, backward.sum())
    torch.testing.assert_close(again, backward.sum())
