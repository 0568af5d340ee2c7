"""
Loads a saved hybrid where only torch and transformers are there, and generates:
python -I demo_reload.py HYBRID ROWS.safetensors LOGITS.safetensors PROMPTS THREADS
It is run as a file, imports nothing of the package, and makes sure that nothing of the package can be imported.
"""

import importlib.util
import json
import sys

import torch
from safetensors.torch import load_file, save_file


PACKAGE = "modeling_manticore"


class Absent:
    """An import hook under which the package does not exist, although it is installed for this Python."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == PACKAGE or name.startswith(PACKAGE + "."):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def main(folder: str, rows: str, logits: str, prompts: str, threads: str) -> None:
    sys.meta_path.insert(0, Absent())
    try:
        importlib.util.find_spec(PACKAGE)
    except ModuleNotFoundError:
        pass
    else:
        raise AssertionError(f"{PACKAGE} can be imported in the process that must do without it")

    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(int(threads))
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    model.eval()
    wrong = {
        key: sorted(map(str, info[key])) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[key]
    }
    with torch.inference_mode():
        save_file({"logits": model(input_ids=load_file(rows)["rows"], use_cache=False).logits.contiguous()}, logits)
    texts = []
    for prompt in json.loads(prompts):
        batch = tokenizer(prompt, return_tensors="pt")
        output = model.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=40,
            do_sample=False,
            repetition_penalty=1.2,
        )
        texts.append(tokenizer.decode(output[0], skip_special_tokens=True))
    if PACKAGE in sys.modules:
        raise AssertionError(f"{PACKAGE} was imported")
    print(json.dumps({"class": type(model).__module__, "wrong_keys": wrong, "texts": texts}))


if __name__ == "__main__":
    main(*sys.argv[1:])
