"""The configuration: round trips, partition, derived limits and special tokens."""

import pickle

import pytest
from tiny import FAMILIES, VOCAB
from transformers import AutoConfig

from modeling_manticore import ManticoreConfig


def configs(*families):
    return [FAMILIES[family]() for family in families]


@pytest.mark.parametrize("families", [("gpt_neox", "mamba"), ("gpt2", "gemma3_text", "mamba2"), ("opt",), ("qwen2",)])
def test_round_trip_through_json_and_pickle(families, tmp_path):
    config = ManticoreConfig.from_partition(
        configs(*families), 2, gate="mixture", mixture="simplex", project_ends=False, hidden_size=48
    )
    config.components[0].source, config.components[0].revision = "someone/model", "abc"
    config.components[0].layer_arity = 2
    expected = {k: v for k, v in config.to_dict().items() if k != "_name_or_path"}
    config.save_pretrained(tmp_path)
    for twin in (
        ManticoreConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        ManticoreConfig.from_dict(config.to_dict()),
        pickle.loads(pickle.dumps(config)),
    ):
        assert {k: v for k, v in twin.to_dict().items() if k not in ("auto_map", "_name_or_path")} == expected
        assert [type(c) for c in twin.components] == [type(c) for c in config.components]
        assert twin.components[0].source == "someone/model" and twin.components[0].layer_arity == 2


@pytest.mark.parametrize(
    "depths, blocks, expected",
    [
        ((4, 3), 2, [[(0, 2), (0, 1)], [(2, 4), (1, 3)]]),
        ((5, 3), 3, [[(0, 1), (0, 1)], [(1, 3), (1, 2)], [(3, 5), (2, 3)]]),
        ((7, 2, 4), 2, [[(0, 3), (0, 1), (0, 2)], [(3, 7), (1, 2), (2, 4)]]),
    ],
)
def test_partition_covers_every_layer_once(depths, blocks, expected):
    parts = []
    for depth in depths:
        part = FAMILIES["llama"]()
        part.num_hidden_layers = depth
        parts.append(part)
    config = ManticoreConfig.from_partition(parts, blocks)
    assert [[(p["start"], p["stop"]) for p in block] for block in config.blocks] == expected
    assert [[p["component"] for p in block] for block in config.blocks] == [list(range(len(depths)))] * blocks
    assert config.num_hidden_layers == blocks


def test_derived_fields():
    long, short, endless = configs("gpt_neox", "gpt2", "mamba2")
    long.max_position_embeddings, short.n_positions = 128, 32
    short.bos_token_id, short.eos_token_id, short.pad_token_id = 3, 4, 5
    config = ManticoreConfig.from_partition([long, short, endless], 2, tokenizer_from=1)
    assert config.max_position_embeddings == 32
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (3, 4, 5)
    assert config.hidden_size == 32 and config.vocab_size == VOCAB
    assert config.tied_components == [1] and config.tie_word_embeddings
    alone = ManticoreConfig(components=[long, endless], blocks=[[{"component": 1, "start": 0, "stop": 3}]])
    assert alone.max_position_embeddings is None and not alone.tie_word_embeddings and alone.is_discretized


def test_components_are_private_copies():
    (given,) = configs("llama")
    config = ManticoreConfig.from_partition([given], 1)
    config.components[0].source = "elsewhere"
    assert not hasattr(given, "source")


def test_an_unknown_keyword_is_kept_as_in_transformers():
    config = ManticoreConfig.from_partition(configs("llama"), 1, num_labels=5)
    assert config.num_labels == 5 and ManticoreConfig.from_dict(config.to_dict()).num_labels == 5
