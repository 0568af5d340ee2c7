"""`manticore describe MODEL`: what a saved hybrid is made of, from its configuration alone."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from .parsing import parse_options, positional_first, require


@dataclass
class DescribeOptions:
    model: str = field(metadata={"help": "Folder or repository of the hybrid."})
    revision: str | None = field(default=None, metadata={"help": "Branch, tag or commit (default: main)."})
    json: bool = field(default=False, metadata={"help": "Print JSON instead of text."})


KINDS = (DescribeOptions,)


def run(arguments: list[str]) -> None:
    """
    Raises:
        ValueError: there is no hybrid.
    """
    (options,) = parse_options(KINDS, positional_first(arguments, "model"), "describe")
    if Path(options.model).is_dir():
        found = (Path(options.model) / "config.json").is_file()
        require(found, f"model: got the folder {options.model!r}, which has no config.json.")

    import torch
    from transformers import AutoConfig

    from ..building.sources import fetched
    from ..cache_manticore import cache_growth
    from ..hub.cards import architecture
    from ..hub.sizes import build_on_meta

    reading = {"trust_remote_code": False, "revision": options.revision or "main"}
    reading = fetched(f"model ({options.model})", options.model, reading, ["config.json"])
    try:
        config = AutoConfig.from_pretrained(options.model, **reading)
    except OSError as error:
        raise ValueError(f"model: {options.model!r} cannot be read ({str(error).splitlines()[0]})") from error
    require(
        config.model_type == "manticore",
        f"model: got {options.model!r} of type {config.model_type!r}, allowed is a hybrid.",
    )
    dtype = config.dtype or torch.float32
    hybrid = build_on_meta(config, dtype)
    if not options.json:
        print(hybrid.describe())
        return
    sizes = {"parameters": sum(p.numel() for p in hybrid.parameters()), "dtype": str(dtype).removeprefix("torch.")}
    sizes["cache_bytes_per_token"] = cache_growth(config, dtype.itemsize)
    print(json.dumps({"model": options.model} | architecture(config) | sizes, indent=2))
