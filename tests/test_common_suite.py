"""transformers' own model tests on hybrids: one in every run, the others and a native Llama behind `make bench`."""

import common_suite
import pytest


pytestmark = pytest.mark.network

TestSupernet = common_suite.suite("llama+mamba2")
TestDiscretized = pytest.mark.slow(common_suite.suite("gpt_neox->mamba"))
TestThreeWidths = pytest.mark.slow(common_suite.suite("gpt2+gemma3_text+falcon_mamba"))
TestExperts = pytest.mark.slow(common_suite.suite("llama+jamba"))
TestNativeLlama = pytest.mark.slow(common_suite.suite("llama"))
