"""What was saved here loads, bit-equal, in a process that has only torch and transformers."""

import json

import torch
from child import run_without_package
from safetensors.torch import load_file, save_file
from tiny import component, tokens
from transformers import AutoModelForCausalLM
from travelling import TRAVELLING

from modeling_manticore import (
    ManticoreForCausalLM,
    ManticoreForSequenceClassification,
    ManticoreForTokenClassification,
    discretize,
)


CODE = """
import json, sys
import torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import (AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification,
                          AutoModelForTokenClassification)
torch.set_num_threads(1)
ids = load_file("ids.safetensors")["ids"]
logits, report = {}, {}
with torch.no_grad():
    for folder in sorted(Path("models").iterdir()):
        options = {"trust_remote_code": True}
        if folder.name.startswith("bf16"):
            options["dtype"] = torch.bfloat16
        model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **options)
        report[folder.name] = sorted(str(key) for name in ("missing_keys", "unexpected_keys", "mismatched_keys")
                                     for key in info[name])
        logits[folder.name] = model(ids).logits.float().contiguous()
        model.save_pretrained(Path("again") / folder.name, max_shard_size="20KB")
        assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "manticore"
    mask = torch.ones_like(ids)
    generated = model.generate(ids, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert generated.shape == (2, ids.shape[1] + 4)
    logits["trunk"] = AutoModel.from_pretrained(folder, trust_remote_code=True)(ids).last_hidden_state
    for name, auto in (("sequence", AutoModelForSequenceClassification), ("token", AutoModelForTokenClassification)):
        logits[name] = auto.from_pretrained(name, trust_remote_code=True)(ids[:1]).logits
save_file(logits, "logits.safetensors")
print(json.dumps(report))
"""


@torch.no_grad()
def test_hybrids_load_where_the_package_is_absent(tmp_path):
    supernet = ManticoreForCausalLM.from_components([component("gpt_neox"), component("mamba2")], num_blocks=2)
    tied = ManticoreForCausalLM.from_components([component("gpt2"), component("mamba")], num_blocks=2)
    half_tied = ManticoreForCausalLM.from_components([component("llama"), component("falcon_mamba")], num_blocks=3)
    models = {
        "bf16": supernet.to(torch.bfloat16),
        "discretized": discretize(tied, [0, 1]),
        "half_tied": half_tied,
        "sharded_tied": tied,
        "untied": ManticoreForCausalLM.from_components([component("gpt_neox"), component("mamba2")], num_blocks=2),
    }
    ids = tokens()
    save_file({"ids": ids}, tmp_path / "ids.safetensors")
    expected = {}
    for name, model in models.items():
        model.save_pretrained(tmp_path / "models" / name, max_shard_size="20KB")
        if name == "bf16":
            model = AutoModelForCausalLM.from_pretrained(tmp_path / "models" / name, dtype=torch.bfloat16)
        expected[name] = model(ids).logits.float()
    expected["trunk"] = models["untied"].model(ids).last_hidden_state
    config = models["untied"].config
    for name, kind in (("sequence", ManticoreForSequenceClassification), ("token", ManticoreForTokenClassification)):
        classifier = kind(config).eval()
        classifier.save_pretrained(tmp_path / name)
        expected[name] = classifier(ids[:1]).logits

    report = json.loads(run_without_package(CODE, tmp_path).splitlines()[-1])
    assert report == {name: [] for name in models}
    found = load_file(tmp_path / "logits.safetensors")
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
    for name in models:
        first, second = (sorted((tmp_path / part / name).glob("*.safetensors")) for part in ("models", "again"))
        assert [file.name for file in first] == [file.name for file in second]
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(first, second)), name
        assert sorted(file.name for file in (tmp_path / "again" / name).glob("*.py")) == sorted(TRAVELLING)
