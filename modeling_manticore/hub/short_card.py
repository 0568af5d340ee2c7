"""The model card of a hybrid that is pushed without one."""

import json
from pathlib import Path

from huggingface_hub import ModelCardData

from .contents import CARRIED


TAGS = ("manticore", "hybrid", "custom_code")
TASKS = {
    "ManticoreForCausalLM": "text-generation",
    "ManticoreForSequenceClassification": "text-classification",
    "ManticoreForTokenClassification": "token-classification",
}


def short_card(repo_id: str, files: dict[str, Path], tags: list[str]) -> str:
    """
    A card with what the saved configuration says and nothing else; no licence, since that is for people to decide.

    Args:
        repo_id: where it goes. files: {path in the repository: local file}. tags: further ones.
    """
    if "adapter_config.json" in files:
        settings = json.loads(files["adapter_config.json"].read_text(encoding="utf-8"))
        base = settings.get("base_model_name_or_path")
        data = ModelCardData(
            base_model=None if base == "local" else base, library_name="peft", tags=[*TAGS[:2], *tags]
        )
        body = f"Adapters for the hybrid language model `{base}`, trained with modeling_manticore.\n"
        return f"---\n{data.to_yaml()}\n---\n\n# {repo_id.split('/')[-1]}\n\n{body}"
    config = json.loads(files["config.json"].read_text(encoding="utf-8"))
    sources = [(entry.get("source"), entry.get("revision")) for entry in config["components"]]
    named = [source for source, _ in sources if isinstance(source, str) and source != "local"]
    kind = (config.get("architectures") or [""])[0]
    data = ModelCardData(
        base_model=named or None,
        library_name="transformers",
        pipeline_tag=TASKS.get(kind),
        tags=list(dict.fromkeys([*TAGS, *tags])),
    )
    origins = [
        f"- component {k}: {config['components'][k]['model_type']}"
        + (f", from `{source}`" if source else "")
        + (f" at `{revision}`" if revision else "")
        for k, (source, revision) in enumerate(sources)
    ]
    auto = "AutoModelForCausalLM" if kind == "ManticoreForCausalLM" else kind.replace("Manticore", "AutoModel", 1)
    code = ", ".join(f"`{name}`" for name in CARRIED)
    return f"""---
{data.to_yaml()}
---

# {repo_id.split("/")[-1]}

A hybrid language model of {len(sources)} pretrained components in {len(config["blocks"])} blocks, made with
modeling_manticore {config.get("manticore_version") or ""}.

{chr(10).join(origins)}

```python
from transformers import {auto or "AutoModel"}

model = {auto or "AutoModel"}.from_pretrained(
    "{repo_id}", trust_remote_code=True, revision="<a commit of this repository>"
)
```

The code that is run ({code}) needs torch and transformers only; `manticore verify {repo_id}` compares it with the
installed release. This card was written automatically. It states no licence and no results: whoever publishes the
model adds the licence, which the components' licences bind, and what was measured.
"""
