"""
The process that `_speed_loading.py` starts. It imports nothing before it is asked to, so that imports can be timed.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path


FIRST, AGAIN = "first load", "load again"


def status(field: str) -> int:
    """Bytes that the kernel says of this process under a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def serve(folders: list[str]) -> None:
    """In the child: import, say how long that took, and for every line on stdin load once in a fork."""
    began = time.perf_counter()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    kinds = {json.loads(Path(folder, "config.json").read_text())["model_type"] for folder in folders}
    if "manticore" in kinds:
        import modeling_manticore

        assert modeling_manticore.ManticoreForCausalLM
    for folder in folders:  # the class of the model and those of its components, imported when first asked for
        config = AutoConfig.from_pretrained(folder)
        for part in [config, *getattr(config, "components", [])]:
            AutoModelForCausalLM._model_mapping[type(part)]
    print(json.dumps({"import": time.perf_counter() - began}), flush=True)
    for _ in sys.stdin:
        process = os.fork()
        if process == 0:
            print(json.dumps(load(folders, AutoModelForCausalLM.from_pretrained)), flush=True)
            os._exit(0)
        if os.waitpid(process, 0)[1] != 0:
            raise SystemExit("the process that loads ended with an error")


def load(folders: list[str], from_pretrained: Callable) -> dict[str, float]:
    """In the fork: the first load of its life and the second; seconds by both clocks, bytes and the first's peak."""
    found: dict[str, float] = {}
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = status("VmRSS")
    for name in (FIRST, AGAIN):
        began = time.perf_counter(), time.process_time()
        models = [from_pretrained(folder) for folder in folders]
        found[f"{name} wall"] = time.perf_counter() - began[0]
        found[f"{name} processor"] = time.process_time() - began[1]
        if name == FIRST:
            found["peak"] = status("VmHWM") - before
            found["bytes"] = sum(p.numel() * p.element_size() for model in models for p in model.parameters())
        del models
    return found


if __name__ == "__main__":
    serve(sys.argv[1:])
