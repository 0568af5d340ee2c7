"""Mamba-2 mixers fitted to a teacher's attention layers on its own states, all layers in one pass over the text."""

import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from _real_weights_models import mamba_layers, start_from_attention
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from modeling_manticore.progress import progress_bar


KEPT_EVERY = 300  # seconds between two checkpoints of an unfinished fit


@dataclass(frozen=True)
class FitOptions:
    """
    How the mixers are fitted: AdamW on 1 - R^2 of the attention's output, warmup over a twentieth, cosine decay.

    Args:
        tokens: read of the training rows, each once. rows_per_step: rows of a step.
        state: entries of a Mamba-2 head's state per channel. seed: of the initialisation.
        like_attention: the mixers have the attention's shape and start from its weights.
    """

    tokens: int
    rows_per_step: int = 4
    learning_rate: float = 2e-3
    state: int = 64
    seed: int = 0
    like_attention: bool = True


class AttentionStates:
    """
    Input and output of the attention of some layers, (rows, tokens, width) each. The trunk of the given Llama is cut
    behind the last of them, so the model cannot be used for anything else.
    """

    def __init__(self, teacher: PreTrainedModel, layers: list[int]):
        self.trunk, self.found = teacher.model, {}
        self.trunk.layers = self.trunk.layers[: max(layers) + 1]
        for layer in layers:
            attention = self.trunk.layers[layer].self_attn
            attention.register_forward_hook(self._keeper(layer), with_kwargs=True)

    def _keeper(self, layer: int) -> Callable:
        def keep(module, args, kwargs, output):
            self.found[layer] = args[0] if args else kwargs["hidden_states"], output[0]

        return keep

    @torch.no_grad()
    def of(self, rows: torch.LongTensor) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Layer -> (input, output)."""
        self.found.clear()
        self.trunk(input_ids=rows, use_cache=False)
        return dict(self.found)


def unexplained(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """1 - R^2: squared error over the variance of the target around its mean, a scalar."""
    variance = (target - target.mean(dim=(0, 1), keepdim=True)).square().sum()
    return (output - target).square().sum() / variance


class MixerFit:
    """One fit, whose checkpoints in a folder of its own a killed run continues from."""

    def __init__(self, teacher: PreTrainedModel, layers: list[int], options: FitOptions, checkpoints: Path):
        self.options, self.layers, self.checkpoints = options, sorted(layers), checkpoints
        torch.manual_seed(options.seed)
        donor = mamba_layers(teacher, len(layers), options.state, like_attention=options.like_attention)
        for layer, own in zip(self.layers, donor.model.layers):
            if options.like_attention:
                start_from_attention(own.mamba, teacher.model.layers[layer].self_attn)
        self.mixers = nn.ModuleDict(
            {str(layer): own.mamba.train() for layer, own in zip(self.layers, donor.model.layers)}
        )
        self.states = AttentionStates(teacher, self.layers)
        self.optimizer = torch.optim.AdamW(self.mixers.parameters(), lr=options.learning_rate, weight_decay=0.0)
        self.step, self.earlier = 0, {"cpu": 0.0, "wall": 0.0}

    def run(self, train: torch.LongTensor, search: torch.LongTensor) -> dict:
        """
        Fit on rows (rows, tokens).

        Returns:
            Held-out R^2 of every layer, tokens, parameters of a mixer, and the seconds before the last start.

        Raises:
            ValueError: there are fewer training rows than the options ask for.
        """
        options = self.options
        count = options.tokens // train.shape[1]
        if count > len(train):
            have = train.numel()
            raise ValueError(f"fit_tokens: got {options.tokens:,}, allowed are at most the {have:,} of the text.")
        steps = max(1, count // options.rows_per_step)
        self._resume()
        cpu, wall, kept = time.process_time(), time.perf_counter(), time.perf_counter()
        with progress_bar(total=steps, initial=self.step, desc="fitting Mamba-2", unit="step") as bar:
            while self.step < steps:
                start = self.step * options.rows_per_step
                self._one_step(train[start : start + options.rows_per_step], self.step / steps)
                self.step += 1
                bar.update()
                if time.perf_counter() - kept > KEPT_EVERY:
                    now = {"cpu": time.process_time() - cpu, "wall": time.perf_counter() - wall}
                    self._keep({key: self.earlier[key] + now[key] for key in now})
                    kept = time.perf_counter()
        return {
            "explained": self.explained(search),
            "tokens": steps * options.rows_per_step * train.shape[1],
            "parameters_of_a_mixer": sum(p.numel() for p in self.mixers[str(self.layers[0])].parameters()),
            "earlier_seconds": self.earlier,
        }

    def save(self, folder: Path) -> None:
        """Write `mixers.safetensors`, which `fitted` reads."""
        save_file(dict(self.mixers.state_dict()), folder / "mixers.safetensors")

    def _one_step(self, rows: torch.LongTensor, progress: float) -> None:
        states = self.states.of(rows)
        scale = min(1.0, (progress + 1e-3) / 0.05) * (0.55 + 0.45 * math.cos(math.pi * progress))
        self.optimizer.param_groups[0]["lr"] = self.options.learning_rate * scale
        self.optimizer.zero_grad()
        for layer in self.layers:
            given, wanted = states[layer]
            mixer = self.mixers[str(layer)]
            unexplained(mixer(given), wanted).backward()
            nn.utils.clip_grad_norm_(mixer.parameters(), 1.0)
        self.optimizer.step()

    @torch.no_grad()
    def explained(self, rows: torch.LongTensor) -> dict[str, float]:
        """Layer -> R^2 on rows, each batch weighted alike."""
        self.mixers.eval()
        found: dict[str, list[float]] = {str(layer): [] for layer in self.layers}
        for batch in rows.split(self.options.rows_per_step):
            for layer, (given, wanted) in self.states.of(batch).items():
                found[str(layer)].append(1 - unexplained(self.mixers[str(layer)](given), wanted).item())
        self.mixers.train()
        return {layer: sum(values) / len(values) for layer, values in found.items()}

    def _keep(self, seconds: dict) -> None:
        """One file with the mixers, the optimizer's moments, the step and the seconds, replaced at once."""
        tensors = {f"mixers.{name}": value for name, value in self.mixers.state_dict().items()}
        for index, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{key}": value for key, value in entry.items()}
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        staged = self.checkpoints / ".fit.safetensors"
        save_file(tensors, staged, metadata={"step": str(self.step), "seconds": json.dumps(seconds)})
        os.replace(staged, self.checkpoints / "fit.safetensors")

    def _resume(self) -> None:
        file = self.checkpoints / "fit.safetensors"
        if not file.is_file():
            return
        tensors = load_file(file)
        with safe_open(file, framework="pt") as opened:
            self.step, self.earlier = int(opened.metadata()["step"]), json.loads(opened.metadata()["seconds"])
        mixers = {name.removeprefix("mixers."): value for name, value in tensors.items() if name.startswith("mixers.")}
        self.mixers.load_state_dict(mixers)
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, index, key = name.split(".")
                moments.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})


def fitted(folder: Path, layers: list[int]) -> dict[int, dict[str, torch.Tensor]]:
    """Layer -> state dictionary of its fitted mixer."""
    with safe_open(folder / "mixers.safetensors", framework="pt") as opened:
        names = list(opened.keys())
        return {
            layer: {name.partition(".")[2]: opened.get_tensor(name) for name in names if name.startswith(f"{layer}.")}
            for layer in layers
        }
