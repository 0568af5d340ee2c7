"""Mutated configurations get our ValueErrors, quickly, in little memory, and nothing else."""

import builtins
import copy
import json
import math
import random
import re
import resource
import socket
import time

import pytest
from tiny import FAMILIES
from transformers.utils import logging

from modeling_manticore import ManticoreConfig


MIXES = [("gpt_neox", "mamba2"), ("gpt2", "gemma3_text", "gpt_neo"), ("qwen2", "jamba"), ("nemotron_h", "opt", "lfm2")]
OURS = re.compile(r"[\w.\[\]-]+: ")
SECONDS, BYTES = 1.0, 200 * 2**20


def seeds():
    """Dictionaries of good configurations, as read from config.json."""
    found = []
    for i, families in enumerate(MIXES):
        families = [name for name in families if name in FAMILIES]
        config = ManticoreConfig.from_partition([FAMILIES[name]() for name in families], 3, skip_paths=i % 2 == 1)
        found.append(json.loads(json.dumps(config.to_dict())))
    return found


def nested(depth):
    value = []
    for i in range(depth):
        value = [value] if i % 2 else {"a": value}
    return value


VALUES = [
    *(0, 1, -1, 2, 3, 7, 100, 2**16, 10**6, 2**31, 2**53, 2**63, 10**30, 10**5000, -(2**31), -(10**30)),
    *(0.0, 0.5, -1.5, 1e300, math.nan, math.inf, -math.inf),
    *(
        None,
        True,
        False,
        "",
        "x",
        "gpt2",
        "../../etc/passwd",
        "https://example.org",
        "manticore",
        "zamba2",
        "clip",
    ),
    *([], {}, [1, 2], [None], ["full_attention"], [[["global", "local"], 10**9]], [[["global"], 2**40]], {"a": 1}),
    *({"rope_type": "yarn", "factor": -1}, {"auto_map": {"AutoConfig": "a--b.C"}}, ["x"] * 5000, list(range(300))),
    *(nested(5), nested(12), nested(40), nested(150)),
]
KEYS = [
    "auto_map",
    "quantization_config",
    "id2label",
    "num_labels",
    "dtype",
    "torch_dtype",
    "model_type",
    "text_config",
]
KEYS += ["rope_scaling", "rope_parameters", "layer_types", "per_layer_config", "num_hidden_layers", "attribute_map"]
KEYS += ["_attn_implementation", "attn_implementation", "problem_type", "__class__", "sub_configs", "name_or_path"]


def places(value, found):
    """Every (container, key) inside."""
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        found.append((value, key))
        if isinstance(inner, (dict, list)):
            places(inner, found)
    return found


def mutate(config, rng):
    """One to three changes: another value, another type, a key gone, a key more, lists for scalars, huge depth."""
    config = copy.deepcopy(config)
    for _ in range(rng.randint(1, 3)):
        container, key = rng.choice(places(config, []))
        kind = rng.randrange(6)
        value = copy.deepcopy(rng.choice(VALUES))
        if kind == 0:
            del container[key]
        elif kind == 1:
            container[key] = [container[key]]
        elif kind == 2 and isinstance(container, dict):
            container[rng.choice([*KEYS, *container])] = value
        elif kind == 3 and isinstance(container[key], int):
            container[key] = container[key] * rng.choice((-1, 10, 10**6, 10**12)) + rng.choice((-1, 0, 1))
        elif kind == 4 and "components" in config and config["components"] and isinstance(config["components"], list):
            component = rng.choice(config["components"])
            if isinstance(component, dict):
                component[rng.choice([*KEYS, *component])] = value
        else:
            container[key] = value
        if not config:
            break
    return config


def run(count, seed):
    """(accepted, refused) counts; fails at the first error that is not ours, is slow, or takes much memory."""
    rng, bases, accepted, refused = random.Random(seed), seeds(), 0, 0
    for base in bases:
        ManticoreConfig.from_dict(copy.deepcopy(base))
    for i in range(count):
        mutant = mutate(bases[i % len(bases)], rng)
        before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
        try:
            config = ManticoreConfig.from_dict(copy.deepcopy(mutant))
        except ValueError as error:
            refused += 1
            assert OURS.match(str(error)), f"{i}: {error}"
        else:
            accepted += 1
            for component in config.components:
                assert 0 < component.num_hidden_layers <= 2**16 and not getattr(component, "auto_map", None)
        seconds = time.process_time() - start
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        assert seconds < SECONDS and grown < BYTES, f"{i}: {seconds:.1f} s, {grown / 2**20:.0f} MB"
    return accepted, refused


@pytest.fixture
def shut(monkeypatch):
    """No network, no new files."""

    def refuse(*args, **kwargs):
        raise RuntimeError(f"a configuration opened {args}")

    def read_only(file, mode="r", *args, **kwargs):
        return refuse(file, mode) if set(mode) & set("wax+") else real_open(file, mode, *args, **kwargs)

    real_open = builtins.open
    monkeypatch.setattr(socket, "socket", refuse)
    monkeypatch.setattr(builtins, "open", read_only)
    logging.set_verbosity(logging.CRITICAL)
    yield
    logging.set_verbosity_warning()


def test_five_thousand_mutated_configurations(shut):
    accepted, refused = run(5000, seed=1)
    assert accepted > 250 and refused > 2500


def changed(**changes):
    config = seeds()[1]
    config["components"][1] |= changes
    return config


COUNT = r"components\[1\].num_hidden_layers: got an integer of 20 bits"
REFUSED = {
    "a million layers": (changed(num_hidden_layers=10**6), COUNT),
    "no layers": (changed(num_hidden_layers=0, layer_types=[]), r"components\[1\].num_hidden_layers: got 0"),
    "negative width": (changed(hidden_size=-4), r"components\[1\].hidden_size: "),
    "a text for a number": (changed(hidden_size="32"), r"components\[1\].hidden_size: .*expected int, got str"),
    "a list for a number": (changed(num_attention_heads=[4]), r"components\[1\].num_attention_heads: .*got list"),
    "nan": (changed(rms_norm_eps=math.nan), r"components\[1\].rms_norm_eps: got nan"),
    "nan inside": (changed(rope_parameters={"a": [math.nan]}), r"components\[1\].rope_parameters.a\[0\]: got nan"),
    "labels": (seeds()[0] | {"num_labels": 10**9}, "config.num_labels: got an integer of 30 bits"),
    "depth": (changed(extra=nested(40)), r"components\[1\].extra.*: got more than 16 levels"),
    "repeats": (changed(attention_types=[[["global"], 10**9]]), r"components\[1\].attention_types\[0\]\[1\]: got"),
    "family": (changed(model_type=["llama"]), r"components\[1\].model_type: got \['llama'\]"),
    "dtype": (seeds()[0] | {"dtype": "load"}, "^dtype: got <"),
    "quantization": (seeds()[0] | {"quantization_config": 0.5}, "^config: AttributeError.*'float'"),
    "layer types": (changed(layer_types=["nothing"] * 4), r"(?s)^components\[1\].*layer_types"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    config, message = REFUSED[case]
    with pytest.raises(ValueError, match=message) as error:
        ManticoreConfig.from_dict(config)
    assert type(error.value) is ValueError and OURS.match(str(error.value))


def test_what_a_component_brings_along():
    code = {"auto_map": {"AutoConfig": "someone/else--code.Config"}}
    config = ManticoreConfig.from_dict(changed(**code, extra=[{"deep": code | {"kept": 1}}]))
    assert not hasattr(config.components[1], "auto_map") and "someone/else" not in config.to_json_string()
    assert config.components[1].extra == [{"deep": {"kept": 1}}]
    config.components[1].extra = {"deep": code}  # as a component in memory may have it
    assert "someone/else" not in config.to_json_string()
    given = seeds()[1]
    kept = copy.deepcopy(given)
    ManticoreConfig.from_dict(given)
    assert given["components"] == kept["components"] and given["blocks"] == kept["blocks"]


def test_limits_leave_room_for_real_models():
    config = ManticoreConfig.from_dict(changed(max_position_embeddings=10_485_760, num_parameters=65_536))
    assert config.components[1].max_position_embeddings == 10_485_760
    assert ManticoreConfig.from_dict(seeds()[0] | {"num_labels": 21_843}).num_labels == 21_843
