"""
Side by side with another way of making a hybrid: two full models run one after the other, a hook on every layer of the
second mixes its state with that of the first, and nothing is cached. It is written here from that description alone.
"""

import torch
from _speed_forward import Settings, projectors_of, training_work
from _speed_shapes import Shape, make, supernet, tokens
from _timing import Work
from torch import nn
from transformers import PreTrainedModel

from modeling_manticore.slicing_manticore import find_layers


GENERATED, PROMPT = 128, 32


class HookedPair(nn.Module):
    """
    Two causal language models. Behind every layer of the second its state is mixed with a projection of what the layer
    of the first at the same place left behind, with a trainable weight a layer; the logits are the second's.
    """

    def __init__(self, first: PreTrainedModel, second: PreTrainedModel):
        super().__init__()
        self.first, self.second = first, second
        sources, targets = self._layers(first), self._layers(second)
        self.weights = nn.Parameter(torch.zeros(len(targets)))
        widths = first.config.hidden_size, second.config.hidden_size
        self.projectors = nn.ModuleList(nn.Linear(*widths) for _ in targets)
        self._states: dict[int, torch.Tensor] = {}
        for i, layer in enumerate(sources):
            layer.register_forward_hook(lambda module, given, output, i=i: self._keep(i, output))
        for i, layer in enumerate(targets):
            beside = i * len(sources) // len(targets)
            layer.register_forward_hook(lambda module, given, output, i=i, j=beside: self._mix(i, j, output))

    @staticmethod
    def _layers(model: PreTrainedModel) -> nn.ModuleList:
        base = model.base_model
        return base.get_submodule(find_layers(base, base.config))

    def _keep(self, i: int, output) -> None:
        self._states[i] = output[0] if isinstance(output, tuple) else output

    def _mix(self, i: int, j: int, output):
        share = torch.sigmoid(self.weights[i])
        state = output[0] if isinstance(output, tuple) else output
        mixed = share * state + (1 - share) * self.projectors[i](self._states[j])
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed

    def forward(self, input_ids: torch.LongTensor, labels: torch.LongTensor | None = None):
        """Token ids (batch, tokens) -> the second model's output."""
        self._states.clear()
        self.first(input_ids=input_ids, use_cache=False)
        return self.second(input_ids=input_ids, labels=labels, use_cache=False)

    @torch.inference_mode()
    def generate(self, input_ids: torch.LongTensor, count: int) -> torch.LongTensor:
        """Greedy, the whole text again for every token. (batch, tokens) -> (batch, tokens + count)."""
        for _ in range(count):
            best = self(input_ids).logits[:, -1].argmax(-1, keepdim=True)
            input_ids = torch.cat([input_ids, best], dim=1)
        return input_ids


def hooked_pair(shape: Shape) -> HookedPair:
    """Of the components that the supernet has too."""
    return HookedPair(make(shape.attention()), make(shape.state(), seed=1)).eval()


def side_by_side_training(shape: Shape, settings: Settings) -> list[dict]:
    """A training step of a supernet against one of the hooked pair; below 1 the supernet is faster."""
    model, pair = supernet(shape)[0], hooked_pair(shape)
    ids = tokens(shape, shape.batch, shape.length)
    row = settings.compare("training step over that of hooks", training_work(model, ids), training_work(pair, ids))
    return [row | {"projectors": [len(projectors_of(model)), len(pair.projectors)]}]


def side_by_side_generation(shape: Shape, settings: Settings) -> list[dict]:
    """128 tokens behind a prompt of 32: a supernet with its cache against the hooked pair without one."""
    model, pair = supernet(shape)[0], hooked_pair(shape)
    prompt = tokens(shape, 1, PROMPT)
    mask = torch.ones_like(prompt)
    options = {"max_new_tokens": GENERATED, "min_new_tokens": GENERATED, "do_sample": False, "pad_token_id": 0}
    ours = Work(lambda: model.generate(prompt, attention_mask=mask, **options))
    theirs = Work(lambda: pair.generate(prompt, GENERATED))
    return [settings.compare(f"{GENERATED} tokens over those of hooks", ours, theirs)]
