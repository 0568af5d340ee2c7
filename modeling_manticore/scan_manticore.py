"""
What mixers of Mamba compute on a CPU without kernels: the scan of Mamba-1 and the short convolution of Mamba-2, each
with a backward pass of its own, and the switch that lets mixers use them and the scan of Mamba-2.

The scan goes through chunks of time that stay in the processor's cache and computes states again instead of keeping
them; the families' own loop takes time that grows with the square of the tokens in its backward pass. Only mixers of a
hybrid get this code, by a subclass; other models in the process keep their own.
"""

import importlib.util
import inspect
import types
from collections.abc import Callable

import torch
from torch import nn
from torch.autograd import forward_ad
from transformers.activations import ACT2FN

from .chunk_scan_manticore import chunk_scan, state_update


OWN = {  # by the scan that a mixer calls, under the families' names: what it gets of ours
    "mamba_selective_scan": {"mamba_selective_scan": "selective_scan", "causal_conv1d_update": "conv_update"},
    "mamba2_chunk_scan": {
        "mamba2_chunk_scan": "chunk_scan",
        "mamba2_selective_state_update": "state_update",
        "causal_conv1d_fn": "causal_conv",
        "causal_conv1d_update": "conv_update",
    },
}
OF_ONE_TOKEN = ("state_update", "conv_update")  # these change a cache in place, so they have no gradients
CACHED_NUMBERS = 2**18  # of a chunk's (tokens, batch, state, channels)
LONGEST_CHUNK = 64


def selective_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    initial_state: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t,  y_t = (C_t h_t + D x_t) silu(z_t)  (Mamba, arXiv 2312.00752, section 3).

    States and sums are float32 whatever comes in (float64 when `hidden_states` are float64).

    Args:
        hidden_states, dt, z: x and its time steps and gate, (batch, channels, tokens). `delta_bias` (channels,) is
            added to the time steps, then their softplus taken with `delta_softplus`.
        A: (channels, state). B, C: (batch, state, tokens). D: (channels,).
        initial_state: h before the first token, (batch, channels, state); zeros where None.
        kwargs: switches of the families' own scan between ways of computing the same; they change nothing here.

    Returns:
        y, (batch, channels, tokens), of the states' dtype; with `return_last_state` also the state after the last
        token, (batch, channels, state).
    """
    kind = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
    if delta_bias is not None:
        dt = dt + delta_bias.to(dt.dtype)[..., None]
    if delta_softplus:
        dt = nn.functional.softplus(dt)
    if initial_state is None:
        initial_state = A.new_zeros(len(dt), A.shape[1], A.shape[0], dtype=kind)
    else:
        initial_state = initial_state.mT.to(kind)
    # Time first, channels last: a step of the recurrence is one contiguous piece, and so is every innermost loop.
    x, steps, B, C = (part.permute(2, 0, 1).to(kind).contiguous() for part in (hidden_states, dt, B, C))
    y, state = _Scan.apply(x, steps, A.mT.to(kind).contiguous(), B, C, initial_state.contiguous())
    y = y.permute(1, 2, 0)
    if D is not None:
        y = y + hidden_states * D[:, None]
    if z is not None:
        y = y * nn.functional.silu(z)
    return (y, state.mT) if return_last_state else y


class _Scan(torch.autograd.Function):
    """x, steps (T, batch, D), A (N, D), B, C (T, batch, N), state (batch, N, D) -> y (T, batch, D), last state."""

    @staticmethod
    def forward(ctx, x, steps, A, B, C, state):
        ctx.chunk = max(1, min(LONGEST_CHUNK, CACHED_NUMBERS // max(state.numel(), 1)))
        y, borders = torch.empty_like(x), []
        with torch.autocast(x.device.type, enabled=False):
            for now in _chunks(len(x), ctx.chunk):
                borders.append(state)
                states = _states(x[now], steps[now], A, B[now], state)[1]
                torch.matmul(C[now].unsqueeze(-2), states, out=y[now].unsqueeze(-2))
                state = states[-1].clone()
        ctx.save_for_backward(x, steps, A, B, C, *borders)
        return y, state if borders else state.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, grad_state):
        x, steps, A, B, C, *borders = ctx.saved_tensors
        grads = [torch.empty_like(part) for part in (x, steps, B, C)]
        grad_x, grad_steps, grad_B, grad_C = grads
        grad_A, carry = torch.zeros_like(A), grad_state
        with torch.autocast(x.device.type, enabled=False):
            for now, border in reversed(list(zip(_chunks(len(x), ctx.chunk), borders))):
                decay, states = _states(x[now], steps[now], A, B[now], border)
                dy = grad_y[now].contiguous()
                torch.matmul(states, dy.unsqueeze(-1), out=grad_C[now].unsqueeze(-1))
                flow = C[now].unsqueeze(-1) * dy.unsqueeze(-2)  # becomes d loss / d state
                flow[-1] += carry
                flows, decays = flow.unbind(0), decay.unbind(0)
                for t in range(len(flows) - 1, 0, -1):
                    flows[t - 1].addcmul_(decays[t], flows[t])
                carry = decays[0] * flows[0]
                torch.matmul(flow, (steps[now] * x[now]).unsqueeze(-1), out=grad_B[now].unsqueeze(-1))
                drive = torch.matmul(B[now].unsqueeze(-2), flow).squeeze(-2)  # d loss / d (dt x)
                torch.mul(drive, steps[now], out=grad_x[now])
                decay *= flow  # becomes d loss / d (dt A)
                decay[1:] *= states[:-1]
                decay[0] *= border
                torch.sum(decay * A, -2, out=grad_steps[now])
                grad_steps[now].addcmul_(drive, x[now])
                grad_A += torch.sum(decay.mul_(steps[now].unsqueeze(-2)), (0, 1))
        return grad_x, grad_steps, grad_A, grad_B, grad_C, carry


def _chunks(tokens: int, length: int) -> list[slice]:
    return [slice(start, min(start + length, tokens)) for start in range(0, tokens, length)]


def _states(x, steps, A, B, state) -> tuple[torch.Tensor, torch.Tensor]:
    """(decay, states) of a chunk, (T, batch, N, D) each; `state` is that before it."""
    decay = torch.mul(steps.unsqueeze(-2), A).exp_()
    states = B.unsqueeze(-1) * (steps * x).unsqueeze(-2)
    for a, following in zip(decay.unbind(0), states.unbind(0)):
        state = following.addcmul_(a, state)
    return decay, states


def causal_conv(
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
    **kwargs,
) -> torch.Tensor:
    """
    Every channel's sum of its last tokens with weights, and `activation` (a name of transformers'); computed in
    float32 at least. In memory the result has the order of `hidden_states`.

    Args:
        hidden_states: (batch, channels, tokens). weight: (channels, width), the last for the token itself.
        bias: (channels,).
        kwargs: of the families' own; they change nothing here.

    Returns:
        (batch, channels, tokens), of the states' dtype.
    """
    kind = torch.promote_types(torch.promote_types(hidden_states.dtype, weight.dtype), torch.float32)
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    silu = activation in ("silu", "swish")
    mixed = _Conv.apply(hidden_states.mT.to(kind), weight.to(kind), bias.to(kind), silu).mT
    if activation is not None and not silu:
        mixed = ACT2FN[activation](mixed)
    return mixed.to(hidden_states.dtype)


class _Conv(torch.autograd.Function):
    """x (batch, T, D), weight (D, width), bias (D,) -> like x, after silu or not."""

    @staticmethod
    def forward(ctx, x, weight, bias, silu):
        ctx.silu, taps = silu, weight.t().contiguous().flip(0)  # the token's own first
        mixed = torch.addcmul(bias, x, taps[0])
        for back in range(1, len(taps)):
            mixed[:, back:].addcmul_(x[:, :-back], taps[back])
        ctx.save_for_backward(x, taps, *([mixed] if silu else []))
        return nn.functional.silu(mixed) if silu else mixed

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, taps, *mixed = ctx.saved_tensors
        if ctx.silu:
            grad = torch.ops.aten.silu_backward(grad, *mixed)
        grad_x, grad_taps = grad * taps[0], [(grad * x).sum((0, 1))]
        for back in range(1, len(taps)):
            grad_x[:, :-back].addcmul_(grad[:, back:], taps[back])
            grad_taps.append((grad[:, back:] * x[:, :-back]).sum((0, 1)))
        return grad_x, torch.stack(grad_taps[::-1], dim=1), grad.sum((0, 1)), None


def conv_update(
    hidden_states: torch.Tensor,
    conv_state: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    activation: str | None = None,
) -> torch.Tensor:
    """
    `causal_conv` of one token, without gradients.

    Args:
        hidden_states: (batch, channels, 1).
        conv_state: the tokens before it, (batch, channels, at least width - 1); moved on by one at the end.

    Returns:
        (batch, channels, 1), of the states' dtype.
    """
    kind = torch.promote_types(torch.promote_types(hidden_states.dtype, weight.dtype), torch.float32)
    tokens = torch.cat([conv_state, hidden_states.to(conv_state.dtype)], dim=-1)
    conv_state.copy_(tokens[..., 1:])
    mixed = (tokens[..., -weight.shape[1] :].to(kind) * weight.to(kind)).sum(-1, keepdim=True)
    if bias is not None:
        mixed += bias.to(kind).unsqueeze(-1)
    if activation is not None:
        mixed = ACT2FN[activation](mixed)
    return mixed.to(hidden_states.dtype)


_SUBCLASSES: dict[type, type] = {}


def use_own_scan(*layers: nn.Module) -> None:
    """
    Let the mixers of layers whose forward calls a scan in `OWN` use this package's code for tensors on a CPU, unless
    the package mamba-ssm is installed. On other devices, with `use_mambapy`, while a graph is being captured and under
    the transforms of `torch.func` the family's own runs; so it does for single tokens with a cache and gradients.
    """
    modules = [module for layer in layers for module in layer.modules()]
    scans = {kind: _scans_called_by(kind) for kind in {*map(type, modules)} if kind.__module__ != __name__}
    scans = {kind: called for kind, called in scans.items() if called}
    if scans and importlib.util.find_spec("mamba_ssm") is None:
        for mixer in modules:
            for scan in scans.get(type(mixer), ()):
                mixer.__class__ = _SUBCLASSES.get(type(mixer)) or _subclass(type(mixer), OWN[scan])


def _scans_called_by(kind: type[nn.Module]) -> set[str]:
    code = getattr(inspect.unwrap(kind.forward), "__code__", use_own_scan.__code__)
    return OWN.keys() & set(code.co_names)


def _subclass(kind: type, functions: dict[str, str]) -> type:
    """The class with this package's functions in place of its own, also for pickle, which looks up by name."""
    theirs = inspect.unwrap(kind.forward).__globals__
    own = {called: _on_cpu(theirs[called], function) for called, function in functions.items() if called in theirs}
    name = f"{kind.__module__.rpartition('.')[2]}_{kind.__name__}"
    content = {"forward": _with_globals(kind.forward, own), "__module__": __name__, "__qualname__": name}
    _SUBCLASSES[kind] = globals()[name] = type(kind.__name__, (kind,), content)
    return _SUBCLASSES[kind]


def _on_cpu(theirs: Callable, own: str) -> Callable:
    def function(first, *args, **kwargs):
        graded = own in OF_ONE_TOKEN and torch.is_grad_enabled()
        if first.device.type != "cpu" or kwargs.get("use_mambapy") or graded or is_transformed():
            return theirs(first, *args, **kwargs)
        return globals()[own](first, *args, **kwargs)

    return function


def is_transformed() -> bool:
    """While a graph is captured, in `torch.func` (vmap, jvp, ...), and where derivatives are taken forward."""
    captured = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return captured or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _with_globals(function: types.FunctionType, values: dict[str, Callable]) -> types.FunctionType:
    """A copy of a function, and of what it wraps, that finds `values` under global names."""
    inner, closure = getattr(function, "__wrapped__", None), function.__closure__
    if inner is not None:
        replaced = _with_globals(inner, values)
        closure = tuple(types.CellType(replaced) if c.cell_contents is inner else c for c in closure)
    # Without a module's name, torch.compile takes the values from here and not from that module.
    others = {key: found for key, found in function.__globals__.items() if key != "__name__"}
    names = others | values if inner is None else function.__globals__
    copy = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    copy.__kwdefaults__, copy.__doc__ = function.__kwdefaults__, function.__doc__
    copy.__module__, copy.__qualname__ = function.__module__, function.__qualname__
    if inner is not None:
        copy.__wrapped__ = replaced
    return copy


__all__ = ["causal_conv", "chunk_scan", "conv_update", "selective_scan", "state_update"]
