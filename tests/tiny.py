"""Tiny components of every family, with weights large enough that a mistake shows in the logits."""

import torch
import transformers as T


VOCAB = 64
_ATTENTION = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
_GROUPED = _ATTENTION | {"num_key_value_heads": 2}
_STATE = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 3, "state_size": 8, "initializer_range": 0.3}
_GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 4, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
_OPT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "ffn_dim": 64,
    "max_position_embeddings": 64,
    "init_std": 0.3,
}
_FALCON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
}
_MAMBA_MIXER = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 4}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GEMMA_LAYERS = ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"]

FAMILIES = {
    "gpt2": lambda: T.GPT2Config(**_GPT2),
    "gpt2_scaled_by_layer": lambda: T.GPT2Config(scale_attn_by_inverse_layer_idx=True, **_GPT2),
    "gpt_neo": lambda: T.GPTNeoConfig(
        vocab_size=VOCAB,
        hidden_size=32,
        num_layers=4,
        num_heads=4,
        attention_types=[[["global", "local"], 2]],
        window_size=4,
        max_position_embeddings=64,
        initializer_range=0.3,
    ),
    "gpt_neox": lambda: T.GPTNeoXConfig(**_ATTENTION),
    "opt": lambda: T.OPTConfig(word_embed_proj_dim=32, **_OPT),
    "opt_projected": lambda: T.OPTConfig(word_embed_proj_dim=16, do_layer_norm_before=False, **_OPT),
    "llama": lambda: T.LlamaConfig(**_GROUPED),
    "qwen2": lambda: T.Qwen2Config(use_sliding_window=True, sliding_window=4, max_window_layers=2, **_GROUPED),
    "qwen3": lambda: T.Qwen3Config(head_dim=8, **_GROUPED),
    "gemma3_text": lambda: T.Gemma3TextConfig(
        head_dim=8, sliding_window=4, layer_types=list(_GEMMA_LAYERS), **_GROUPED
    ),
    "gptj": lambda: T.GPTJConfig(rotary_dim=4, **_GPT2),
    "bloom": lambda: T.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=4, n_head=4, initializer_range=0.3),
    "mistral": lambda: T.MistralConfig(sliding_window=4, **_GROUPED),
    "gemma2": lambda: T.Gemma2Config(
        head_dim=8, query_pre_attn_scalar=8, sliding_window=4, final_logit_softcapping=3.0, **_GROUPED
    ),
    "olmo2": lambda: T.Olmo2Config(**_GROUPED),
    "phi3": lambda: T.Phi3Config(**_GROUPED | _SPECIAL),
    "smollm3": lambda: T.SmolLM3Config(no_rope_layer_interval=2, **_GROUPED | _SPECIAL),
    "falcon": lambda: T.FalconConfig(**_FALCON),
    "falcon_alibi": lambda: T.FalconConfig(alibi=True, **_FALCON),
    "lfm2": lambda: T.Lfm2Config(layer_types=["conv", "full_attention", "conv", "full_attention"], **_GROUPED),
    "jamba": lambda: T.JambaConfig(
        attn_layer_period=2,
        attn_layer_offset=1,
        num_experts=4,
        expert_layer_period=2,
        expert_layer_offset=1,
        mamba_d_state=8,
        **_GROUPED,
    ),
    "bamba": lambda: T.BambaConfig(attn_layer_indices=[1, 3], **_MAMBA_MIXER, **_GROUPED),
    "qwen3_next": lambda: T.Qwen3NextConfig(
        head_dim=8,
        linear_key_head_dim=8,
        linear_value_head_dim=8,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=32,
        num_experts=4,
        num_experts_per_tok=2,
        layer_types=["linear_attention", "full_attention", "linear_attention", "linear_attention"],
        **_GROUPED,
    ),
    "nemotron_h": lambda: T.NemotronHConfig(
        layers_block_type=["mamba", "attention", "moe", "mamba"],
        head_dim=8,
        mamba_num_heads=8,
        mamba_head_dim=8,
        ssm_state_size=8,
        n_groups=2,
        chunk_size=4,
        n_routed_experts=4,
        moe_intermediate_size=32,
        moe_shared_expert_intermediate_size=32,
        **{key: value for key, value in _GROUPED.items() if key != "num_hidden_layers"},
    ),
    "granitemoehybrid": lambda: T.GraniteMoeHybridConfig(
        layer_types=["mamba", "attention", "mamba", "attention"],
        embedding_multiplier=2.0,
        logits_scaling=3.0,
        residual_multiplier=0.5,
        attention_multiplier=0.3,
        num_local_experts=4,
        shared_intermediate_size=32,
        position_embedding_type="rope",
        **_MAMBA_MIXER,
        **_GROUPED,
    ),
    "falcon_h1": lambda: T.FalconH1Config(
        mamba_d_ssm=64,
        embedding_multiplier=2.0,
        lm_head_multiplier=0.5,
        ssm_multipliers=[0.5, 0.7, 0.9, 1.1, 1.3],
        mlp_multipliers=[0.8, 1.2],
        key_multiplier=0.7,
        **_MAMBA_MIXER,
        **_GROUPED,
    ),
    "recurrent_gemma": lambda: T.RecurrentGemmaConfig(
        lru_width=32,
        attention_window_size=64,
        block_types=["recurrent", "attention"],
        w_init_variance_scale=0.5,
        **{k: v for k, v in _GROUPED.items() if k not in ("max_position_embeddings", "initializer_range")},
    ),
    "mamba": lambda: T.MambaConfig(**_STATE),
    "mamba2": lambda: T.Mamba2Config(num_heads=4, head_dim=8, n_groups=1, chunk_size=4, expand=2, **_STATE),
    "falcon_mamba": lambda: T.FalconMambaConfig(**_STATE),
}


def component(family: str, seed: int = 0, **changes) -> T.PreTrainedModel:
    """A causal language model of the family with random weights, in evaluation mode."""
    torch.manual_seed(seed)
    config = FAMILIES[family]()
    for key, value in changes.items():
        setattr(config, key, value)
    return T.AutoModelForCausalLM.from_config(config).eval()


def tokens(rows: int = 2, length: int = 12, seed: int = 1) -> torch.LongTensor:
    """Random token ids, (rows, length)."""
    return torch.randint(0, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))
