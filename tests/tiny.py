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
