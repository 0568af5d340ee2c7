"""
The scan of Mamba-2 on a CPU without kernels, over many tokens and of one.

Over many: matrix products over short chunks that the heads of a group share, and a backward pass of its own. The
families' own has a product for each head, over chunks as long as suits a GPU. Of one: the state changes in place, with
one decay for a head where the families' own has one for each number of the state.
"""

import torch
from torch import nn


CHUNK = 32  # tokens
NUMBERS = 2**19  # of the chunks that are computed together, (tokens, batch, channels)


def chunk_scan(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int | None = None,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **kwargs,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t^T,  y_t = C_t h_t + D x_t with one number A for a head, by the block
    decomposition of the state space dual form (Mamba-2, arXiv 2405.21060, section 6).

    States and sums are float32 whatever comes in (float64 when `hidden_states` are float64); sums of decays in time
    are float64.

    Args:
        hidden_states: x, (batch, tokens, heads, channels). dt: time steps, (batch, tokens, heads); `dt_bias` (heads,)
            is added, then their softplus taken with `dt_softplus`, then they are clamped to `dt_limit`.
        A, D: (heads,). B, C: (batch, tokens, groups, state).
        initial_states: h before the first token, (batch, heads, channels, state); zeros where None.
        chunk_size, kwargs: of the families' own scan, between ways of computing the same; they change nothing here.

    Returns:
        y, (batch, tokens, heads, channels), in the dtype of the states; with `return_final_states` also the state
        after the last token, (batch, heads, channels, state).
    """
    kind = torch.float64 if hidden_states.dtype == torch.float64 else torch.float32
    if dt_bias is not None:
        dt = dt + dt_bias.to(dt.dtype)
    if dt_softplus:
        dt = nn.functional.softplus(dt)
    if tuple(dt_limit) != (0.0, float("inf")) or not dt_softplus:
        dt = dt.clamp(*dt_limit)
    batch, _, groups, _ = B.shape
    x, steps = ((part.to(kind).unflatten(2, (groups, -1))) for part in (hidden_states, dt))
    D = A.new_zeros(A.shape) if D is None else D
    A, D = (part.to(kind).unflatten(0, (groups, -1)) for part in (A, D))
    decays = steps * A
    state = None
    if initial_states is not None:
        state = initial_states.to(kind).unflatten(1, (groups, -1)).permute(0, 1, 4, 2, 3).flatten(0, 1)
    # Groups have nothing in common: each is a row of the batch.
    rows = [part.transpose(1, 2).flatten(0, 1) for part in (x, steps, decays, B.to(kind), C.to(kind))]
    y, state = _ChunkScan.apply(*rows, D.repeat(batch, 1), state, return_final_states)
    y = y.unflatten(0, (batch, groups)).transpose(1, 2).flatten(2, 3)
    if not return_final_states:
        return y
    return y, state.unflatten(0, (batch, groups)).permute(0, 1, 3, 4, 2).flatten(1, 2).contiguous()


class _ChunkScan(torch.autograd.Function):
    """
    x (batch, T, H, P), steps, decays (batch, T, H), B, C (batch, T, N), D (batch, H), state (batch, N, H, P) or None
    -> y like x, the last state or None unless `last`.
    """

    @staticmethod
    def forward(ctx, x, steps, decays, B, C, D, state, last):
        ctx.stateless = state is None and not last and x.shape[1] <= CHUNK
        if state is None and not ctx.stateless:
            state = x.new_zeros(len(x), B.shape[2], *x.shape[2:])
        y, kept = torch.empty_like(x, memory_format=torch.contiguous_format), []
        with torch.autocast(x.device.type, enabled=False):
            for now in _pieces(x):
                chunks = _Chunks(now, x, steps, decays, B, C)
                out = chunks.of(y).copy_(chunks.within().transpose(2, 3))
                out.addcmul_(chunks.x, D[:, None, None, :, None])
                if not ctx.stateless:
                    states = chunks.states(state)
                    out += chunks.read(states)
                    kept.append(states)
                    state = states[:, -1]
        ctx.save_for_backward(x, steps, decays, B, C, D, *kept)
        return y, state.clone() if last else None

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y, carry):
        x, steps, decays, B, C, D, *kept = ctx.saved_tensors
        parts = (x, steps, decays, B, C)
        grads = [torch.empty_like(part, memory_format=torch.contiguous_format) for part in parts]
        grad_D = torch.zeros_like(D)
        if carry is None and not ctx.stateless:
            carry = x.new_zeros(len(x), B.shape[2], *x.shape[2:])
        with torch.autocast(x.device.type, enabled=False):
            for number, now in reversed(list(enumerate(_pieces(x)))):
                chunks = _Chunks(now, *parts)
                dy = chunks.of(grad_y)
                drive, grad_B, grad_C, grad_total = chunks.within_backward(dy)
                if not ctx.stateless:
                    carry = chunks.states_backward(dy, kept[number], carry, drive, grad_B, grad_C, grad_total)
                grad_x, grad_steps, grad_decays = (chunks.of(grad) for grad in grads[:3])
                torch.mul(drive, chunks.steps.unsqueeze(-1), out=grad_x).addcmul_(dy, D[:, None, None, :, None])
                grad_D += (dy * chunks.x).sum((1, 2, 4))
                grad_steps.copy_(drive.mul_(chunks.x).sum(-1))
                grad_decays.copy_(grad_total.flip(2).cumsum(2).flip(2))
                chunks.of(grads[3]).copy_(grad_B)
                chunks.of(grads[4]).copy_(grad_C)
        return *grads, grad_D, carry if ctx.needs_input_grad[6] else None, None


def _pieces(x: torch.Tensor) -> list[tuple[slice, int]]:
    """Tokens that are computed together, of x (batch, T, H, P), and in how many chunks."""
    batch, tokens, *channels = x.shape
    length = min(CHUNK, max(tokens, 1))
    most = max(1, NUMBERS // max(1, batch * length * channels[0] * channels[1]))
    starts = list(range(0, tokens // length * length, most * length)) + [tokens // length * length, tokens]
    pieces = [(slice(start, stop), -(-(stop - start) // length)) for start, stop in zip(starts, starts[1:])]
    return [(now, number) for now, number in pieces if number]


class _Chunks:
    """
    `number` chunks of equal length, k below, of l tokens: x (batch, k, l, H, P), steps and `total` (batch, k, l, H),
    the sum of decays from the chunk's beginning, B, C (batch, k, l, N).
    """

    def __init__(self, now: tuple[slice, int], x, steps, decays, B, C):
        self.now, self.number = now
        self.x, self.steps, self.B, self.C = (self.of(part) for part in (x, steps, B, C))
        # Differences of long sums are small: in float32 they would be wrong in the last three digits.
        self.total = self.of(decays).cumsum(2, dtype=torch.float64)
        by_head = self.total.transpose(2, 3)
        self.decay = (by_head.unsqueeze(-1) - by_head.unsqueeze(-2)).to(x.dtype).exp_().tril_()  # batch, k, H, l, l
        self.scores = self.C @ self.B.mT  # batch, k, l, l
        self.drive = x.new_empty(*self.decay.shape[:-1], x.shape[-1])  # dt x, batch, k, H, l, P
        torch.mul(self.x.transpose(2, 3), self.steps.transpose(2, 3).unsqueeze(-1), out=self.drive)

    def of(self, part: torch.Tensor) -> torch.Tensor:
        """(batch, T, ...) -> (batch, k, l, ...), a view."""
        return part[:, self.now].unflatten(1, (self.number, -1))

    def within(self) -> torch.Tensor:
        """What tokens of a chunk get from tokens of the same, (batch, k, H, l, P)."""
        return (self.decay * self.scores.unsqueeze(2)) @ self.drive

    def states(self, state: torch.Tensor) -> torch.Tensor:
        """Before the first chunk and after each, (batch, k + 1, N, H, P), from that before the first."""
        states = torch.cat([state.unsqueeze(1), self._onto(self._until_end() * self.steps)], dim=1)
        for before, after, factor in zip(states.unbind(1), states.unbind(1)[1:], self._over_chunk()):
            after.addcmul_(before, factor)
        return states

    def read(self, states: torch.Tensor) -> torch.Tensor:
        """What tokens get from the state before their chunk, like x."""
        read = (self.C @ states[:, :-1].flatten(3)).view_as(self.drive.transpose(2, 3))
        return read.mul_(self._since_start().unsqueeze(-1))

    def within_backward(self, dy: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Gradients of `within` to dt x (like x), B, C and `total` (float64) from that to y."""
        flow = dy.transpose(2, 3).contiguous()
        drive = torch.empty_like(self.x, memory_format=torch.contiguous_format)
        drive.copy_(((self.decay * self.scores.unsqueeze(2)).mT @ flow).transpose(2, 3))
        pairs = (flow @ self.drive.mT).mul_(self.decay)
        scores = pairs.sum(2)
        pairs.mul_(self.scores.unsqueeze(2)).tril_(-1)
        # In float64, what a pair gives to both its tokens cancels between them.
        total = (pairs.sum(-1, dtype=torch.float64) - pairs.sum(-2, dtype=torch.float64)).transpose(2, 3)
        return drive, scores.mT @ self.C, scores @ self.B, total

    def states_backward(self, dy, states, carry, drive, grad_B, grad_C, grad_total) -> torch.Tensor:
        """Adds gradients by way of the states to the last four; returns that to the state before the first chunk."""
        shape = states[:, 1:].shape
        flow = (dy * self._since_start().unsqueeze(-1)).flatten(3)  # d loss / d (C h), h before the chunk
        before = states[:, :-1].flatten(3)
        grad_C += flow @ before.mT
        grad_total += (self.C @ before).mul_(flow).view_as(drive).sum(-1)
        grads = (self.C.mT @ flow).view(shape)
        for own, factor in zip(reversed(grads.unbind(1)), reversed(self._over_chunk())):
            # Here is wanted the gradient to the state after the chunk; that to the one before goes on.
            carry, after = torch.addcmul(own, carry, factor), carry
            own.copy_(after)
        kept = (grads * states[:, :-1]).sum((2, 4)) * self.total[:, :, -1].exp()
        grads, until_end = grads.flatten(3), self._until_end()
        grad_B += (self.x * (until_end * self.steps).unsqueeze(-1)).flatten(3) @ grads.mT
        through = (self.B @ grads).view_as(drive).mul_(until_end.unsqueeze(-1))
        drive += through
        through = through.mul_(self.x).sum(-1, dtype=torch.float64) * self.steps
        grad_total -= through
        grad_total[:, :, -1] += kept + through.sum(2)
        return carry

    def _onto(self, weights: torch.Tensor) -> torch.Tensor:
        """Sums over tokens of B x^T with weights (batch, k, l, H): (batch, k, N, H, P)."""
        return (self.B.mT @ (self.x * weights.unsqueeze(-1)).flatten(3)).unflatten(3, self.x.shape[3:])

    def _until_end(self) -> torch.Tensor:
        return (self.total[:, :, -1:] - self.total).exp_().to(self.x.dtype)

    def _since_start(self) -> torch.Tensor:
        return self.total.exp().to(self.x.dtype)

    def _over_chunk(self) -> tuple[torch.Tensor, ...]:
        """A factor of each chunk, (batch, 1, H, 1)."""
        return self.total[:, :, -1].exp().to(self.x.dtype)[:, :, None, :, None].unbind(1)


def state_update(
    state: torch.Tensor,
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    dt_softplus: bool = False,
    z: torch.Tensor | None = None,
    **kwargs,
) -> torch.Tensor:
    """
    `chunk_scan` of one token, without gradients; what is the same in all of a head comes as its first number.

    Args:
        state: h before the token, (batch, heads, channels, state); that after it stands there at the end.
        hidden_states, dt: (batch, heads, channels). A: (heads, channels, state). B, C: (batch, groups, state).
        D, dt_bias: (heads, channels).
        z: a gate, (batch, heads, channels); y is multiplied by its silu.
        kwargs: of the families' own; they change nothing here.

    Returns:
        y, (batch, heads, channels), of the dtype of `hidden_states`.
    """
    steps = dt[..., 0]
    if dt_bias is not None:
        steps = steps + dt_bias[:, 0].to(dt.dtype)
    if dt_softplus:
        steps = nn.functional.softplus(steps)
    x, steps, A, B, C = (part.to(state.dtype) for part in (hidden_states, steps, A[:, 0, 0], B, C))
    by_group = state.unflatten(1, (B.shape[1], -1))
    state.mul_((steps * A).exp_()[..., None, None])
    drive = (x * steps.unsqueeze(-1)).unflatten(1, (B.shape[1], -1))
    by_group.addcmul_(drive.unsqueeze(-1), B[:, :, None, None])
    y = (by_group.flatten(2, 3) @ C.unsqueeze(-1)).view_as(x)
    if D is not None:
        y.addcmul_(x, D)
    if z is not None:
        y *= nn.functional.silu(z)
    return y.to(hidden_states.dtype)


__all__ = ["chunk_scan", "state_update"]
