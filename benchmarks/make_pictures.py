"""Draw the pictures in docs/ that the README shows: a supernet and one discretized hybrid of it. Needs no weights."""

from pathlib import Path

from transformers import GPTNeoXConfig, Mamba2Config

from modeling_manticore import ManticoreConfig
from modeling_manticore.hub.picture import draw_hybrid


DOCS = Path(__file__).parents[1] / "docs"
NAMES = ["GPT-NeoX", "Mamba-2"]


def main() -> None:
    """Write `docs/supernet.svg` and `docs/hybrid.svg`."""
    sizes = {"vocab_size": 4096, "num_hidden_layers": 6, "bos_token_id": 0, "eos_token_id": 0}
    attention = GPTNeoXConfig(hidden_size=256, num_attention_heads=8, **sizes)
    state_space = Mamba2Config(hidden_size=192, num_heads=12, head_dim=32, expand=2, pad_token_id=0, **sizes)
    supernet = ManticoreConfig.from_partition([attention, state_space], 3)
    draw_hybrid(supernet, DOCS / "supernet.svg", names=NAMES)
    blocks = [[supernet.blocks[b][k]] for b, k in enumerate((0, 1, 1))]
    draw_hybrid(ManticoreConfig(components=[attention, state_space], blocks=blocks), DOCS / "hybrid.svg", names=NAMES)


if __name__ == "__main__":
    main()
