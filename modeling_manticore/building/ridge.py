"""Streaming ridge regression in float64: keeps Gram matrices, never the data."""

from dataclasses import dataclass

import torch


STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1)


class Moments:
    """Sums over tokens of x, y, x x', x y' and |y|^2, in float64."""

    def __init__(self, inputs: int, outputs: int, device: torch.device):
        zeros = {"dtype": torch.float64, "device": device}
        self.count = 0
        self.x, self.y = torch.zeros(inputs, **zeros), torch.zeros(outputs, **zeros)
        self.xx, self.xy = torch.zeros(inputs, inputs, **zeros), torch.zeros(inputs, outputs, **zeros)
        self.yy = torch.zeros((), **zeros)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add tokens: x (tokens, inputs), y (tokens, outputs)."""
        x, y = x.to(self.x), y.to(self.y)
        self.count += len(x)
        self.x += x.sum(0)
        self.y += y.sum(0)
        self.xx += x.T @ x
        self.xy += x.T @ y
        self.yy += (y**2).sum()

    def __add__(self, other: "Moments") -> "Moments":
        total = Moments(len(self.x), len(self.y), self.x.device)
        for name in ("count", "x", "y", "xx", "xy", "yy"):
            setattr(total, name, getattr(self, name) + getattr(other, name))
        return total

    def solve(self, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Weight (outputs, inputs) and bias (outputs,) of argmin |y - W x - b|^2 + strength * mean diagonal * |W|^2, the
        mean diagonal being that of the centred Gram matrix.
        """
        mean_x, mean_y = self.x / self.count, self.y / self.count
        gram = self.xx - self.count * torch.outer(mean_x, mean_x)
        cross = self.xy - self.count * torch.outer(mean_x, mean_y)
        scale = gram.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        weight = torch.linalg.solve(
            gram + strength * scale * torch.eye(len(gram), dtype=gram.dtype, device=gram.device), cross
        )
        return weight.T, mean_y - weight.T @ mean_x

    def fit(self, weight: torch.Tensor, bias: torch.Tensor) -> float:
        """Share of the variance of y around its mean that W x + b explains (R^2) on these tokens."""
        residual = (
            self.yy
            - 2 * (weight.T * self.xy).sum()
            - 2 * bias @ self.y
            + ((weight @ self.xx) * weight).sum()
            + 2 * bias @ (weight @ self.x)
            + self.count * bias @ bias
        )
        variance = self.yy - self.y @ self.y / self.count
        return float(1 - residual / variance.clamp_min(torch.finfo(torch.float64).tiny))


@dataclass
class Solution:
    """Weight (outputs, inputs), bias (outputs,), the strength chosen and the fit on held-out tokens."""

    weight: torch.Tensor
    bias: torch.Tensor
    strength: float
    fit: float
    tokens: int


class Regression:
    """A ridge regression whose strength is chosen from `STRENGTHS` by the fit on held-out tokens."""

    def __init__(self, inputs: int, outputs: int, device: torch.device):
        self.parts = {held_out: Moments(inputs, outputs, device) for held_out in (False, True)}

    def add(self, x: torch.Tensor, y: torch.Tensor, held_out: bool) -> None:
        """Add tokens (tokens, inputs) and (tokens, outputs) to one of the two parts."""
        self.parts[held_out].add(x, y)

    def solve(self) -> Solution:
        """Choose the strength on the held-out part, then solve on both parts together."""
        trials = []
        for strength in STRENGTHS:
            weight, bias = self.parts[False].solve(strength)
            trials.append((self.parts[True].fit(weight, bias), strength))
        fit, strength = max(trials)
        both = self.parts[False] + self.parts[True]
        weight, bias = both.solve(strength)
        return Solution(weight, bias, strength, fit, both.count)
