"""The model of the compression task: from the state at the last token, a small decoder gives back every token."""

import math

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel


class CompressionDecoder(nn.Module):
    """
    A non-expanding MLP that gives the logits of every token of a sequence from one state. It is told the position by
    fixed sinusoids added to the state, as in MAD.
    """

    def __init__(self, hidden_size: int, vocab_size: int, sequence_length: int):
        """
        Raises:
            ValueError: a size is not positive, or `hidden_size` is odd.
        """
        for name, value in (("vocab_size", vocab_size), ("sequence_length", sequence_length)):
            if value < 1:
                raise ValueError(f"{name}: got {value}, allowed is a positive integer.")
        if hidden_size < 2 or hidden_size % 2:
            raise ValueError(f"hidden_size: got {hidden_size}, allowed is a positive even integer.")
        super().__init__()
        self.register_buffer("positions", sinusoids(sequence_length, hidden_size), persistent=False)
        layers: list[nn.Module] = []
        for _ in range(2):
            layers += [nn.LayerNorm(hidden_size), nn.Linear(hidden_size, hidden_size), nn.GELU()]
        self.layers = nn.Sequential(*layers, nn.LayerNorm(hidden_size), nn.Linear(hidden_size, vocab_size))

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """Logits (rows, sequence_length, vocab_size) from states (rows, hidden_size)."""
        return self.layers(state[:, None] + self.positions.to(state.dtype))


def sinusoids(length: int, size: int) -> torch.Tensor:
    """Sines and cosines of positions 0..length - 1 at size / 2 frequencies from 1 to 1/10000, (length, size)."""
    half = size // 2
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half) / max(1, half - 1))
    angles = torch.arange(length)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class CompressionModel(nn.Module):
    """Any model that gives hidden states, and a `CompressionDecoder` that sees only the one at the last token."""

    def __init__(self, trunk: PreTrainedModel, vocab_size: int, sequence_length: int):
        """
        Args:
            trunk: from `AutoModel`: token ids to `last_hidden_state` (rows, sequence_length, hidden_size).
        """
        super().__init__()
        self.trunk = trunk
        self.decoder = CompressionDecoder(trunk.config.hidden_size, vocab_size, sequence_length)

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """
        `logits` (rows, sequence_length, vocabulary), of label i at position i; with labels (rows, sequence_length)
        also `loss`, the mean cross-entropy in nats over those that are not -100.
        """
        states = self.trunk(input_ids=input_ids, use_cache=False).last_hidden_state
        logits = self.decoder(states[:, -1])
        if labels is None:
            return {"logits": logits}
        loss = functional.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
        return {"loss": loss, "logits": logits}
