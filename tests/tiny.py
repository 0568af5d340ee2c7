"""Tiny components of every family, with weights large enough that a mistake shows in the logits."""

import torch
import transformers as T

from modeling_manticore.configuration_manticore import REFUSED_FAMILIES
from modeling_manticore.scan_manticore import use_own_scan


VOCAB = 64


def _attention(width: int) -> dict:
    return {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 2 * width,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }


def _grouped(width: int) -> dict:
    return _attention(width) | {"num_key_value_heads": 2}


def _state(width: int) -> dict:
    return {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "num_hidden_layers": 3,
        "state_size": 8,
        "initializer_range": 0.2,
    }


def _gpt2(width: int) -> dict:
    return {
        "vocab_size": VOCAB,
        "n_embd": width,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 64,
        "initializer_range": 0.2,
    }


def _opt(width: int) -> dict:
    return {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "ffn_dim": 2 * width,
        "max_position_embeddings": 64,
        "init_std": 0.2,
    }


def _falcon(width: int) -> dict:
    return {
        "vocab_size": VOCAB,
        "hidden_size": width,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "initializer_range": 0.2,
    }


def _mamba_mixer(width: int) -> dict:
    return {
        "mamba_n_heads": width // 4,
        "mamba_d_head": 8,
        "mamba_n_groups": 2,
        "mamba_d_state": 8,
        "mamba_chunk_size": 4,
    }


_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GEMMA_LAYERS = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]

FAMILIES = {
    "gpt2": lambda d=32: T.GPT2Config(**_gpt2(d)),
    "gpt2_scaled_by_layer": lambda d=32: T.GPT2Config(scale_attn_by_inverse_layer_idx=True, **_gpt2(d)),
    "gpt_neo": lambda d=32: T.GPTNeoConfig(
        vocab_size=VOCAB,
        hidden_size=d,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=4,
        max_position_embeddings=64,
        initializer_range=0.2,
    ),
    "gpt_neox": lambda d=32: T.GPTNeoXConfig(**_attention(d)),
    "opt": lambda d=32: T.OPTConfig(word_embed_proj_dim=d, **_opt(d)),
    "opt_projected": lambda d=32: T.OPTConfig(word_embed_proj_dim=16, do_layer_norm_before=False, **_opt(d)),
    "llama": lambda d=32: T.LlamaConfig(**_grouped(d)),
    "qwen2": lambda d=32: T.Qwen2Config(use_sliding_window=True, sliding_window=4, max_window_layers=2, **_grouped(d)),
    "qwen3": lambda d=32: T.Qwen3Config(head_dim=8, **_grouped(d)),
    "gemma3_text": lambda d=32: T.Gemma3TextConfig(
        head_dim=8, sliding_window=4, layer_types=list(_GEMMA_LAYERS), **_grouped(d)
    ),
    "gptj": lambda d=32: T.GPTJConfig(rotary_dim=4, **_gpt2(d)),
    "bloom": lambda d=32: T.BloomConfig(vocab_size=VOCAB, hidden_size=d, n_layer=4, n_head=4, initializer_range=0.2),
    "mistral": lambda d=32: T.MistralConfig(sliding_window=4, **_grouped(d)),
    "gemma2": lambda d=32: T.Gemma2Config(
        head_dim=8, query_pre_attn_scalar=8, sliding_window=4, final_logit_softcapping=3.0, **_grouped(d)
    ),
    "olmo2": lambda d=32: T.Olmo2Config(**_grouped(d)),
    "phi3": lambda d=32: T.Phi3Config(**_grouped(d) | _SPECIAL),
    "smollm3": lambda d=32: T.SmolLM3Config(no_rope_layer_interval=2, **_grouped(d) | _SPECIAL),
    "falcon": lambda d=32: T.FalconConfig(**_falcon(d)),
    "falcon_alibi": lambda d=32: T.FalconConfig(alibi=True, **_falcon(d)),
    "lfm2": lambda d=32: T.Lfm2Config(layer_types=["conv", "full_attention", "conv", "full_attention"], **_grouped(d)),
    "jamba": lambda d=32: T.JambaConfig(
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=4,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        **_grouped(d),
    ),
    "bamba": lambda d=32: T.BambaConfig(attn_layer_indices=[1, 3], **_mamba_mixer(d), **_grouped(d)),
    "qwen3_next": lambda d=32: T.Qwen3NextConfig(
        head_dim=8,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        moe_intermediate_size=d,
        shared_expert_intermediate_size=d,
        num_experts=4,
        num_experts_per_tok=2,
        layer_types=["linear_attention", "full_attention", "linear_attention", "linear_attention"],
        **_grouped(d) | {"initializer_range": 0.1},
    ),
    "nemotron_h": lambda d=32: T.NemotronHConfig(
        layers_block_type=["mamba", "attention", "moe", "mamba"],
        head_dim=8,
        mamba_num_heads=8,
        mamba_head_dim=8,
        ssm_state_size=8,
        time_step_min=0.3,
        n_groups=2,
        chunk_size=4,
        n_routed_experts=4,
        moe_intermediate_size=d,
        moe_shared_expert_intermediate_size=d,
        **{key: value for key, value in _grouped(d).items() if key != "num_hidden_layers"},
    ),
    "granitemoehybrid": lambda d=32: T.GraniteMoeHybridConfig(
        layer_types=["mamba", "attention", "mamba", "attention"],
        embedding_multiplier=2.0,
        logits_scaling=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.3,
        num_local_experts=4,
        shared_intermediate_size=d,
        position_embedding_type="rope",
        **_mamba_mixer(d),
        **_grouped(d),
    ),
    "falcon_h1": lambda d=32: T.FalconH1Config(
        mamba_d_ssm=2 * d,
        embedding_multiplier=2.0,
        lm_head_multiplier=0.5,
        ssm_multipliers=[0.5, 0.7, 0.9, 1.1, 1.3],
        mlp_multipliers=[0.8, 1.2],
        key_multiplier=0.7,
        **_mamba_mixer(d),
        **_grouped(d),
    ),
    "recurrent_gemma": lambda d=32: T.RecurrentGemmaConfig(
        lru_width=d,
        attention_window_size=64,
        block_types=["recurrent", "attention"],
        w_init_variance_scale=0.5,
        **{k: v for k, v in _grouped(d).items() if k not in ("max_position_embeddings", "initializer_range")},
    ),
    "mamba": lambda d=16: T.MambaConfig(**_state(d)),
    "mamba2": lambda d=16: T.Mamba2Config(
        num_heads=d // 4, head_dim=8, n_groups=1, chunk_size=4, expand=2, **_state(d)
    ),
    "falcon_mamba": lambda d=16: T.FalconMambaConfig(**_state(d)),
}
FAMILIES = {name: config for name, config in FAMILIES.items() if name not in REFUSED_FAMILIES}


def component(family: str, seed: int = 0, width: int | None = None, **changes) -> T.PreTrainedModel:
    """A causal language model of the family with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    config = FAMILIES[family]() if width is None else FAMILIES[family](width)
    for key, value in changes.items():
        setattr(config, key, value)
    return T.AutoModelForCausalLM.from_config(config).eval()


def scanned(model: T.PreTrainedModel) -> T.PreTrainedModel:
    """The model, with the scan of a hybrid in Mamba-1 layers (test_scan.py holds it against theirs)."""
    use_own_scan(model)
    return model


def tokens(rows: int = 2, length: int = 12, seed: int = 1) -> torch.LongTensor:
    """Random token ids, (rows, length)."""
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
