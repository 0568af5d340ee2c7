"""Shapes of the speed benchmark: components with random weights, hybrids of them, and the same layers natively."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GPTNeoXConfig,
    Mamba2Config,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.masking_utils import create_causal_mask, create_recurrent_attention_mask

from modeling_manticore import ManticoreForCausalLM
from modeling_manticore.scan_manticore import use_own_scan


LONGEST = 32_768  # positions of the attention components


@dataclass(frozen=True)
class Shape:
    """
    Size of a component. `batch` and `length` are those of a forward pass and a training step; contexts are those that
    decoding goes on from, with one row, with 16 rows, and in hybrids without attention.
    """

    name: str
    width: int
    layers: int
    vocabulary: int
    batch: int
    length: int
    head: int = 32
    contexts: tuple = (256, 1024, 4096)
    wide_contexts: tuple = (256, 1024)  # of 16 rows
    state_contexts: tuple = (256, 1024, 4096, 16_384)
    is_bounded: bool = True  # whether bounds are promised for it
    blocks: int = 4  # of a supernet
    steps: int = 64  # tokens that a decoding is averaged over

    def attention(self, layers: int | None = None) -> GPTNeoXConfig:
        """A Transformer."""
        return GPTNeoXConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            num_hidden_layers=layers or self.layers,
            num_attention_heads=self.width // self.head,
            intermediate_size=4 * self.width,
            max_position_embeddings=LONGEST,
            tie_word_embeddings=False,
        )

    def state(self, layers: int | None = None) -> Mamba2Config:
        """A state-space model."""
        return Mamba2Config(
            vocab_size=self.vocabulary,
            hidden_size=self.width,
            num_hidden_layers=layers or self.layers,
            expand=2,
            head_dim=self.head,
            num_heads=2 * self.width // self.head,
            n_groups=1,
            state_size=32,
            chunk_size=32,
            tie_word_embeddings=False,
        )


SHAPES = {
    "tiny": Shape("tiny", 64, 12, 512, 4, 128, is_bounded=False),
    "small": Shape("small", 192, 12, 2048, 4, 128),
    "100m": Shape("100m", 768, 12, 8192, 2, 128, head=64, contexts=(256, 1024, 4096), wide_contexts=(256,)),
}


def make(config: PreTrainedConfig, seed: int = 0) -> PreTrainedModel:
    """A language model with random weights."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config).eval()


def tokens(shape: Shape, rows: int, length: int, seed: int = 1) -> torch.LongTensor:
    """Random token ids, (rows, length)."""
    return torch.randint(0, shape.vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def paths(*slices: tuple[int, int, int]) -> list[list[dict[str, int]]]:
    """Blocks of one path each, from (component, start, stop)."""
    return [[{"component": k, "start": start, "stop": stop}] for k, start, stop in slices]


@dataclass
class Pair:
    """
    A hybrid and the native model of the same layers, how many slices the hybrid has, and whether it has attention and
    is the same function as the native model. With `has_our_mamba` the native model's state-space layers run the code
    of hybrids (`scan_manticore.py`) in place of transformers': what is left is the cost of joining, and no bound is
    promised for it.
    """

    hybrid: PreTrainedModel
    native: nn.Module
    slices: int
    has_attention: bool = True
    is_same: bool = True
    has_our_mamba: bool = False

    def bound(self, promised: float) -> float | None:
        """What is promised against a native model, or None."""
        return None if self.has_our_mamba else promised


def one_slice(shape: Shape, kind: str = "attention") -> Pair:
    """A hybrid that is one whole component; the uncut component."""
    component = make(getattr(shape, kind)())
    hybrid = ManticoreForCausalLM.from_components([component], blocks=paths((0, 0, shape.layers)))
    return Pair(hybrid, component, 1, kind == "attention")


def one_layer_slices(shape: Shape, kind: str = "attention") -> Pair:
    """A hybrid that is one component, cut into a slice per layer; the uncut component."""
    component = make(getattr(shape, kind)())
    blocks = paths(*((0, layer, layer + 1) for layer in range(shape.layers)))
    hybrid = ManticoreForCausalLM.from_components([component], blocks=blocks)
    return Pair(hybrid, component, shape.layers, kind == "attention")


def mixed(shape: Shape, *slices: tuple[int, int, int]) -> Pair:
    """A hybrid of slices of a Transformer (0) and a state-space model (1), and those layers in a loop."""
    components = [make(shape.attention()), make(shape.state(), seed=1)]
    hybrid = ManticoreForCausalLM.from_components(components, blocks=paths(*slices))
    bridges = [block.paths[0].in_projector for block in hybrid.model.blocks]
    return Pair(hybrid, PlainLoop(*components, slices, bridges), len(slices))


def half_and_half(shape: Shape) -> Pair:
    """The first half of a Transformer, a bridge, the second half of a state-space model; those layers in a loop."""
    half = shape.layers // 2
    return mixed(shape, (0, 0, half), (1, half, shape.layers))


def alternating(shape: Shape) -> Pair:
    """A layer of a Transformer, a bridge, one of a state-space model, a bridge and so on; those layers in a loop."""
    return mixed(shape, *((layer % 2, layer, layer + 1) for layer in range(shape.layers)))


def with_our_mamba(build: Callable[[Shape], Pair], shape: Shape) -> Pair:
    """The same, and our code in the loop's state-space layers, too."""
    pair = build(shape)
    use_own_scan(pair.native)
    return replace(pair, has_our_mamba=True)


def two_states(shape: Shape) -> Pair:
    """A hybrid without attention, of two state-space models; an uncut one of as many layers, without a bridge."""
    half = shape.layers // 2
    components = [make(shape.state(), seed=seed) for seed in (0, 1)]
    hybrid = ManticoreForCausalLM.from_components(components, blocks=paths((0, 0, half), (1, half, shape.layers)))
    return Pair(hybrid, components[0], 2, has_attention=False, is_same=False)


def supernet(shape: Shape, blocks: int | None = None) -> tuple[PreTrainedModel, list[PreTrainedModel]]:
    """A supernet of a Transformer and a state-space model, of the shape's number of blocks or another; and the two."""
    components = [make(shape.attention()), make(shape.state(), seed=1)]
    return ManticoreForCausalLM.from_components(components, num_blocks=blocks or shape.blocks), components


class PlainLoop(nn.Module):
    """
    What one would write by hand for layers of a GPT-NeoX and a Mamba-2: their own layers in a plain loop, one mask of
    each kind and one rotary table shared by all layers that use it, a linear bridge wherever the component changes.

    Args:
        first, second: the components; the first has the embedding, the second the final norm and the head.
        slices: (component, start, stop) in order. bridges: what the hybrid has in front of each slice, or None.
    """

    def __init__(self, first: PreTrainedModel, second: PreTrainedModel, slices: Sequence[tuple], bridges: list):
        super().__init__()
        self.first_config, self.second_config = first.config, second.config
        self.embedding, self.rotary = first.gpt_neox.embed_in, first.gpt_neox.rotary_emb
        self.dropout = first.gpt_neox.emb_dropout
        self.steps, self.kinds = nn.ModuleList(), []
        for (component, start, stop), bridge in zip(slices, bridges, strict=True):
            if bridge is not None:
                self.steps.append(nn.Linear(bridge.in_features, bridge.out_features))
                self.steps[-1].load_state_dict(bridge.state_dict())
            layers = second.backbone.layers if component else first.gpt_neox.layers
            self.steps.extend(layers[start:stop])
            self.kinds += ["bridge"] * (bridge is not None) + ["state" if component else "attention"] * (stop - start)
        self.norm, self.head = second.backbone.norm_f, second.lm_head

    def forward(self, input_ids, attention_mask=None, past_key_values=None, use_cache=False, logits_to_keep=0):
        """Token ids (batch, tokens) -> object with logits (batch, kept tokens, vocabulary) and the cache."""
        cache = past_key_values
        if use_cache and cache is None:
            cache = Caches(DynamicCache(config=self.first_config), DynamicCache(config=self.second_config))
        x = self.dropout(self.embedding(input_ids))
        seen = 0 if cache is None else cache.attention.get_seq_length()
        positions = torch.arange(seen, seen + x.shape[1], device=x.device)[None]
        own = None if cache is None else cache.attention
        common = {"config": self.first_config, "inputs_embeds": x, "attention_mask": attention_mask}
        mask = create_causal_mask(**common, past_key_values=own, position_ids=positions)
        attention = {
            "attention_mask": mask,
            "position_ids": positions,
            "layer_past": own,
            "use_cache": use_cache,
            "position_embeddings": self.rotary(x, position_ids=positions),
        }
        state = None if cache is None else cache.state
        if attention_mask is not None:
            attention_mask = attention_mask[:, -x.shape[1] :]
        mask = create_recurrent_attention_mask(
            config=self.second_config, inputs_embeds=x, attention_mask=attention_mask, past_key_values=state
        )
        given = {"attention": attention, "state": {"cache_params": state, "attention_mask": mask}, "bridge": {}}
        for kind, step in zip(self.kinds, self.steps):
            x = step(x, **given[kind])
        x = self.norm(x)
        kept = slice(-logits_to_keep, None) if logits_to_keep else slice(None)
        return Output(self.head(x[:, kept]).float(), cache)


@dataclass
class Caches:
    """Of the two kinds of layers."""

    attention: DynamicCache
    state: DynamicCache


@dataclass
class Output:
    """What a plain loop returns."""

    logits: torch.Tensor
    past_key_values: Caches | None
