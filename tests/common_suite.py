"""
transformers' own model tests, run on hybrids.

The source distribution of the installed transformers carries `tests/test_modeling_common.py`; it is fetched once into
the cache folder. Two modules that it imports are not in the distribution: their mixins are empty classes here.
"""

import contextlib
import functools
import importlib
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import types
import unittest
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from unittest import mock

import torch
import transformers as T
from transformers.models.auto import modeling_auto

from modeling_manticore import (
    ManticoreConfig,
    ManticoreForCausalLM,
    ManticoreForSequenceClassification,
    ManticoreForTokenClassification,
    ManticoreModel,
)
from modeling_manticore.tasks.text import cache_folder


PACKAGE = "transformers_own_tests"
MEMBER = "tests/test_modeling_common.py"
FETCH_TIMEOUT = 240
ABSENT = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}


def fetch() -> Path:
    """The folder that holds `test_modeling_common.py` of the installed version; downloaded when absent."""
    release = version("transformers")
    target = cache_folder() / f"transformers-{release}-tests" / Path(MEMBER).name
    if not target.is_file():
        target.parent.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".fetching-") as folder:
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
            command += ["--no-binary", "transformers", "--dest", folder, f"transformers=={release}"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=FETCH_TIMEOUT)
            (archive,) = Path(folder).glob("*.tar.gz")
            with tarfile.open(archive) as opened:
                content = opened.extractfile(f"transformers-{release}/{MEMBER}").read()
            unpacked = Path(folder) / target.name
            unpacked.write_bytes(content)
            os.replace(unpacked, target)
    return target.parent


def load() -> types.ModuleType:
    """transformers' `test_modeling_common` from the cache folder, with stand-ins for the two absent modules."""
    name = f"{PACKAGE}.test_modeling_common"
    if name not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(fetch())]
        sys.modules[PACKAGE] = package
        for module_name, mixin in ABSENT.items():
            parent = f"{PACKAGE}.{module_name.partition('.')[0]}"
            sys.modules[parent] = types.ModuleType(parent)
            module = types.ModuleType(f"{PACKAGE}.{module_name}")
            setattr(module, mixin, type(mixin, (), {}))
            sys.modules[module.__name__] = module
    return importlib.import_module(name)


_COMMON = {"vocab_size": 99, "num_hidden_layers": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_ATTENTION = _COMMON | {"num_attention_heads": 4, "intermediate_size": 37, "max_position_embeddings": 512}
_STATE = _COMMON | {"state_size": 8}


def _llama(width: int = 32) -> T.LlamaConfig:
    return T.LlamaConfig(hidden_size=width, num_key_value_heads=2, **_ATTENTION)


def _mamba2(width: int) -> T.Mamba2Config:
    return T.Mamba2Config(
        hidden_size=width, num_heads=width // 4, head_dim=8, n_groups=1, chunk_size=8, expand=2, **_STATE
    )


def _supernet() -> ManticoreConfig:
    return ManticoreConfig.from_partition([_llama(32), _mamba2(16)], num_blocks=2)


def _discretized() -> ManticoreConfig:
    blocks = [[{"component": 0, "start": 0, "stop": 1}], [{"component": 1, "start": 1, "stop": 2}]]
    components = [T.GPTNeoXConfig(hidden_size=32, **_ATTENTION), T.MambaConfig(hidden_size=16, **_STATE)]
    return ManticoreConfig(components=components, blocks=blocks)


def _three() -> ManticoreConfig:
    gemma = T.Gemma3TextConfig(
        hidden_size=48,
        head_dim=12,
        num_key_value_heads=2,
        sliding_window=4,
        layer_types=["sliding_attention", "full_attention"],
        **_ATTENTION,
    )
    gpt2 = T.GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=512, **{k: _COMMON[k] for k in _IDS})
    components = [gpt2, gemma, T.FalconMambaConfig(hidden_size=16, **_STATE)]
    return ManticoreConfig.from_partition(components, num_blocks=2, gate="mixture")


def _moe() -> ManticoreConfig:
    jamba = T.JambaConfig(
        hidden_size=32,
        num_key_value_heads=2,
        num_experts=2,
        num_experts_per_tok=1,
        expert_layer_period=2,
        expert_layer_offset=1,
        attn_layer_period=2,
        attn_layer_offset=1,
        mamba_d_state=8,
        use_mamba_kernels=False,
        **_ATTENTION | {"intermediate_size": 64},
    )
    return ManticoreConfig.from_partition([_llama(32), jamba], num_blocks=2)


_IDS = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")
HYBRID_CLASSES = (
    ManticoreModel,
    ManticoreForCausalLM,
    ManticoreForSequenceClassification,
    ManticoreForTokenClassification,
)
LLAMA_CLASSES = (
    T.LlamaModel,
    T.LlamaForCausalLM,
    T.LlamaForSequenceClassification,
    T.LlamaForTokenClassification,
)
# name: (configuration, classes). "llama" is the yardstick: an ordinary model of transformers under the same shims.
SUBJECTS = {
    "llama+mamba2": (_supernet, HYBRID_CLASSES),
    "gpt_neox->mamba": (_discretized, HYBRID_CLASSES),
    "gpt2+gemma3_text+falcon_mamba": (_three, HYBRID_CLASSES),
    "llama+jamba": (_moe, HYBRID_CLASSES),
    "llama": (_llama, LLAMA_CLASSES),
}


class Subject:
    """What transformers calls a model tester: sizes, configurations and inputs."""

    def __init__(self, make_config):
        self.make_config = make_config
        config = make_config()
        self.batch_size, self.seq_length, self.is_training = 3, 7, True
        self.num_hidden_layers, self.hidden_size = config.num_hidden_layers, config.hidden_size
        self.vocab_size, self.num_attention_heads = config.vocab_size, 4

    def get_config(self) -> T.PreTrainedConfig:
        return self.make_config()

    def prepare_config_and_inputs_for_common(self):
        ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


NO_ATTENTIONS = (
    "A hybrid refuses output_attentions with an error: its paths attend in different ways, and some not at all."
)
SEVERAL_EMBEDDINGS = (
    "A supernet has one embedding per stem; no one inputs_embeds stands for all, and it is refused with an error."
)
NO_EXPERTS = "No component of this hybrid has experts."
STREAM_BESIDE = (
    "Under the routed gate a component hears itself unprojected: the stream in hidden_states is an image beside the "
    "way from tokens to logits, and gets no gradient."
)
# Tests that do not apply to hybrids, by pattern, each with the fact because of which it does not.
SKIPS = {
    "test_attention_outputs": NO_ATTENTIONS,
    r"test_eager_matches_sdpa_inference_.*output_attentions": NO_ATTENTIONS,
}
ROUTED_SKIPS = {"test_retain_grad_hidden_states_attentions": STREAM_BESIDE}
SUPERNET_SKIPS = {
    "test_inputs_embeds": SEVERAL_EMBEDDINGS,
    "test_inputs_embeds_matches_input_ids": SEVERAL_EMBEDDINGS,
}
EXPERTS_SKIPS = {r"test_eager_matches_batched_and_grouped_inference_.*": NO_EXPERTS}
FACTS = (NO_ATTENTIONS, SEVERAL_EMBEDDINGS, STREAM_BESIDE, NO_EXPERTS)
# Tests that ask for attentions among other things; they run, but do not ask for those.
WITHOUT_ATTENTIONS = (
    "test_model_outputs_equivalence",
    "test_retain_grad_hidden_states_attentions",
    "test_capture_outputs_decorator",
)
LABELS = {
    "MODEL_MAPPING_NAMES": "ManticoreModel",
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "ManticoreForCausalLM",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES": "ManticoreForSequenceClassification",
    "MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES": "ManticoreForTokenClassification",
}


def suite(name: str) -> type[unittest.TestCase]:
    """The test case that runs transformers' model tests on one of the SUBJECTS; a failing one where there are none."""
    try:
        common = load()
    except (OSError, subprocess.SubprocessError, tarfile.TarError) as error:
        return unfetched(name, error)
    tests = common.ModelTesterMixin
    make_config, classes = SUBJECTS[name]
    members = {"all_model_classes": classes, "subject": name}
    if classes is HYBRID_CLASSES:
        config = make_config()
        skips = dict(SKIPS)
        if len(config.stem_components) > 1:
            skips |= SUPERNET_SKIPS | (ROUTED_SKIPS if config.gate == "routed" else {})
        if not any(T.MODEL_MAPPING[type(c)]._can_set_experts_implementation() for c in config.components):
            skips |= EXPERTS_SKIPS
        for test in [test for test in dir(tests) if test.startswith("test_") and callable(getattr(tests, test))]:
            reason = next((reason for pattern, reason in skips.items() if re.fullmatch(pattern, test)), None)
            if reason:
                members[test] = unittest.skip(reason)(getattr(tests, test))
            elif test in WITHOUT_ATTENTIONS:
                members[test] = without_attentions(getattr(tests, test), config)
        members["test_can_init_all_missing_weights_before_2023"] = True

    def set_up(self):
        self.model_tester = Subject(make_config)
        # Some tests read warnings; all look up by class name what a model is for, in tables of the library's own.
        self.addCleanup(T.logging.set_verbosity, T.logging.get_verbosity())
        T.logging.set_verbosity_warning()
        for table, class_name in LABELS.items():
            patch = mock.patch.dict(getattr(modeling_auto, table), {"manticore": class_name})
            patch.start()
            self.addCleanup(patch.stop)

    members["setUp"] = set_up
    return type("CommonSuite", (tests, common.GenerationTesterMixin, unittest.TestCase), members)


def unfetched(name: str, error: Exception) -> type[unittest.TestCase]:
    """A test case that fails with the reason, so that the other test modules still run."""
    reason = (getattr(error, "stderr", None) or str(error)).strip()

    def test_that_the_tests_of_transformers_can_be_fetched(self):
        raise RuntimeError(f"The source distribution of transformers could not be fetched: {reason}") from error

    members = {test.__name__: test for test in [test_that_the_tests_of_transformers_can_be_fetched]}
    return type("CommonSuite", (unittest.TestCase,), members | {"subject": name})


def without_attentions(test: Callable, config: ManticoreConfig) -> Callable:
    """The test, with components that do not offer to record attentions."""
    bases = {base for component in config.components for base in T.MODEL_MAPPING[type(component)].__mro__}
    recording = [base for base in bases if vars(base).get("_can_record_outputs")]

    @functools.wraps(test)
    def run(self):
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(self, "has_attentions", False))
            for base in recording:
                others = {key: value for key, value in base._can_record_outputs.items() if "attentions" not in key}
                stack.enter_context(mock.patch.object(base, "_can_record_outputs", others))
            test(self)

    return run
