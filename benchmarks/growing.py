"""
How time and memory grow: building, searching and decoding against the number of components, blocks and parameters, and
decoding of a hybrid without attention against its context; and what a second process is worth in training.

    components, blocks, parameters  seconds and peak memory of composing a supernet and of `stitch`, seconds a token of
                                    decoding a hybrid of alternating components
    context                         prefill, decoding and cache of a Mamba next to a Mamba-2, 1k to 64k tokens
    processes                       tokens per second of two processes (gloo), over twice those of one

    python benchmarks/growing.py [--measures components blocks ...] [--quick] [--resume]

Every point is a process of its own. Slopes are those of straight lines through the logarithms: 1 is proportional, 0
constant. Models are untrained, times do not depend on it; what overlaps with imports of Python is not counted.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch
from _shared import RESULTS, quiet, write
from _timing import commit, machine
from transformers import AutoModelForCausalLM, GPTNeoXConfig, LlamaConfig, Mamba2Config, MambaConfig

from modeling_manticore import ManticoreForCausalLM, discretize, stitch


VOCABULARY, LAYERS = 512, 8
FAMILIES = ("gpt_neox", "mamba2", "llama", "mamba")
DEFAULTS = {"components": 2, "blocks": 2, "width": 64}
POINTS = {
    "components": [{"components": k} for k in (2, 3, 4)],
    "blocks": [{"blocks": b} for b in (1, 2, 4, 8)],
    "parameters": [{"width": width} for width in (64, 128, 256, 512)],
    "context": [{"context": 1024 * 2**i} for i in range(7)],
    "processes": [{"processes": n, "kind": kind} for n, kind in ((1, "none"), (2, "ddp"), (2, "fsdp"))],
}
QUICK = {
    "components": [{"components": k} for k in (2, 3)],
    "blocks": [{"blocks": b} for b in (1, 2)],
    "parameters": [{"width": width} for width in (32, 64)],
    "context": [{"context": 64 * 2**i} for i in range(2)],
    "processes": POINTS["processes"],
}
CURVES = {
    "build_seconds": "building, s",
    "build_bytes": "building, peak bytes",
    "search_seconds": "search, s",
    "search_bytes": "search, peak bytes",
    "decode_seconds": "decoding, s per token",
    "prefill_seconds": "prefill, s",
    "prefill_bytes": "prefill, peak bytes",
    "cache_bytes": "cache, bytes",
}


def component(family: str, width: int, layers: int = LAYERS):
    """An untrained component."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": width, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 4, "max_position_embeddings": 512, "intermediate_size": 4 * width}
    config = {
        "gpt_neox": lambda: GPTNeoXConfig(**sizes, **heads),
        "llama": lambda: LlamaConfig(**sizes, **heads),
        "mamba": lambda: MambaConfig(**sizes),
        "mamba2": lambda: Mamba2Config(
            **sizes, num_heads=8, head_dim=width // 4, n_groups=1, state_size=16, chunk_size=32
        ),
    }[family]()
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


class Peak:
    """Bytes of resident memory at the peak inside, beyond those at the start, and seconds."""

    def __enter__(self):
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        self.before, self.started = self._resident("VmRSS"), time.perf_counter()
        return self

    def __exit__(self, *_):
        self.seconds = time.perf_counter() - self.started
        self.bytes = max(0, self._resident("VmHWM") - self.before)

    @staticmethod
    def _resident(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


@torch.no_grad()
def decoding(model, prompt: torch.Tensor, steps: int = 64) -> tuple[Peak, float, int]:
    """The prefill, median seconds of a step of one token after it, and bytes of tensors in the cache."""
    with Peak() as prefill:
        out = model(prompt, use_cache=True, logits_to_keep=1)
    cache, token, seconds = out.past_key_values, out.logits[:, -1:].argmax(-1), []
    held = sum(tensor.numel() * tensor.element_size() for layer in cache.layers for tensor in tensors_of(vars(layer)))
    for _ in range(steps):
        started = time.perf_counter()
        token = model(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
        seconds.append(time.perf_counter() - started)
    return prefill, median(seconds), held


def tensors_of(value: object) -> list[torch.Tensor]:
    """The tensors in a value, also inside of lists and dictionaries."""
    if isinstance(value, torch.Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def size_point(components: int, blocks: int, width: int) -> dict:
    """Building, searching, decoding."""
    parts = [component(family, width) for family in FAMILIES[:components]]
    with Peak() as building:
        model = ManticoreForCausalLM.from_components(parts, num_blocks=blocks)
    rows = torch.randint(0, VOCABULARY, (16, 64), generator=torch.Generator().manual_seed(0))
    with Peak() as searching:
        report = stitch(model, *rows.split(8), progress=False)
    hybrid = discretize(model, [b % components for b in range(blocks)], refit=False)
    decode = decoding(hybrid, rows[:1])[1]
    return {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "hybrids": len(report.candidates),
        "build_seconds": building.seconds,
        "build_bytes": building.bytes,
        "search_seconds": searching.seconds,
        "search_bytes": searching.bytes,
        "decode_seconds": decode,
    }


def context_point(context: int) -> dict:
    """Prefill, decoding and cache of a hybrid without attention."""
    parts = [component(family, 32, 4) for family in ("mamba", "mamba2")]
    hybrid = discretize(ManticoreForCausalLM.from_components(parts, num_blocks=2), [0, 1], refit=False)
    prompt = torch.randint(0, VOCABULARY, (1, context), generator=torch.Generator().manual_seed(0))
    decoding(hybrid, prompt[:, :64], steps=8)  # warm-up
    prefill, decode, held = decoding(hybrid, prompt)
    return {
        "prefill_seconds": prefill.seconds,
        "prefill_bytes": prefill.bytes,
        "decode_seconds": decode,
        "cache_bytes": held,
    }


def training_process(kind: str, rank: int, processes: int, file: str, steps: int) -> dict:
    """Tokens per second of one process, by its median step after two others; every process has the same batch size."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard

    parts = [component(family, 128) for family in FAMILIES[:2]]
    model = discretize(ManticoreForCausalLM.from_components(parts, num_blocks=4), [0, 1, 0, 1], refit=False).train()
    if processes > 1:
        dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=processes)
    wrapped = model
    if kind == "ddp":
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
    elif kind == "fsdp":
        mesh = dist.init_device_mesh("cpu", (processes,))
        for module in [m for m in model.modules() if type(m).__name__ in model._no_split_modules]:
            fully_shard(module, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(wrapped.parameters())
    ids = torch.randint(0, VOCABULARY, (8, 128), generator=torch.Generator().manual_seed(rank))
    seconds = []
    for _ in range(steps + 2):
        started = time.perf_counter()
        wrapped(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
    held = sum((p.to_local() if kind == "fsdp" else p).nbytes for p in model.parameters())
    if processes > 1:
        dist.destroy_process_group()
    return {"tokens_per_second": ids.numel() / median(seconds[2:]), "weight_bytes": held}


def run_children(commands: list[list[str]]) -> list[dict]:
    """
    The results of children that run side by side.

    Raises:
        RuntimeError: one of them failed.
    """
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    children = [subprocess.Popen([sys.executable, __file__, *words], env=environment, **pipes) for words in commands]
    told = [child.communicate() for child in children]
    failed = [error for child, (_, error) in zip(children, told) if child.returncode]
    if failed:
        raise RuntimeError(failed[0][-3000:])
    return [json.loads(output.splitlines()[-1]) for output, _ in told]


def point(measure: str, given: dict, steps: int) -> dict:
    """One point of a curve, in processes of its own."""
    if measure != "processes":
        return run_children([["--point", json.dumps(given)]])[0]
    with tempfile.TemporaryDirectory() as folder:
        ranks = [
            given | {"rank": rank, "file": f"{folder}/meet", "steps": steps} for rank in range(given["processes"])
        ]
        found = run_children([["--point", json.dumps(rank)] for rank in ranks])
    return {
        "tokens_per_second": sum(rank["tokens_per_second"] for rank in found),
        "weight_bytes": max(rank["weight_bytes"] for rank in found),
    }


def child(given: dict) -> dict:
    """What a point's process measures."""
    if "processes" in given:
        return training_process(**given)
    return context_point(**given) if "context" in given else size_point(**DEFAULTS | given)


def slope(x: list[float], y: list[float]) -> float | None:
    """Of the straight line through the logarithms; None where something is zero."""
    if len(x) < 2 or min(*x, *y) <= 0:
        return None
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


def curves(measure: str, points: list[dict]) -> dict:
    """x, every y, and its slope; for processes the efficiency of each kind."""
    if measure == "processes":
        alone = points[0]["found"]["tokens_per_second"]
        return {
            "efficiency": {
                p["given"]["kind"]: p["found"]["tokens_per_second"] / (alone * p["given"]["processes"])
                for p in points[1:]
            }
        }
    x = [p["found"]["parameters"] if measure == "parameters" else p["given"][measure] for p in points]
    y = {name: [p["found"][name] for p in points] for name in CURVES if name in points[0]["found"]}
    return {"x": x, "y": y, "slopes": {name: slope(x, values) for name, values in y.items()}}


def draw(results: dict) -> Path:
    """`results/growing.svg`: a row for each measure, seconds and bytes side by side."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "growing"
    import matplotlib.pyplot as plt

    shown = [name for name in results if name != "processes"]
    figure, axes = plt.subplots(len(shown), 2, figsize=(10, 3.2 * len(shown)), squeeze=False)
    for row, name in zip(axes, shown):
        found = results[name]["curves"]
        for axis, unit in zip(row, ("seconds", "bytes")):
            for key in (key for key in found["y"] if key.endswith(unit)):
                told = "" if found["slopes"][key] is None else f", slope {found['slopes'][key]:.2f}"
                axis.plot(found["x"], found["y"][key], marker="o", label=CURVES[key] + told)
            axis.set(xscale="log", yscale="log", xlabel=name, ylabel=unit)
            axis.legend(fontsize=7)
            axis.grid(alpha=0.3)
    figure.tight_layout()
    file = RESULTS / "growing.svg"
    figure.savefig(file, metadata={"Date": None})
    plt.close(figure)
    return file


def report(measure: str, found: dict) -> None:
    """Print a measure's points and slopes."""
    print(f"{measure}:")
    for p in found["points"]:
        values = "  ".join(f"{key} {value:.3g}" for key, value in p["found"].items())
        print(f"  {' '.join(map(str, p['given'].values())):10} {values}")
    if measure == "processes":
        print("  " + ", ".join(f"{k}: efficiency {e:.2f}" for k, e in found["curves"]["efficiency"].items()))
        return
    told = {key: value for key, value in found["curves"]["slopes"].items() if value is not None}
    print("  slopes  " + "  ".join(f"{key} {value:.2f}" for key, value in told.items()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--measures", nargs="+", choices=list(POINTS), default=list(POINTS))
    parser.add_argument("--quick", action="store_true", help="few and small points, in a file of their own")
    parser.add_argument("--resume", action="store_true", help="keep finished points of the results' file")
    parser.add_argument("--point", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    if options.point is not None:
        print(json.dumps(child(options.point)))
        return
    name = "growing_quick" if options.quick else "growing"
    file, results = RESULTS / f"{name}.json", {}
    if options.resume and file.is_file():
        results = json.loads(file.read_text())["measures"]
    for measure in options.measures:
        known = {json.dumps(p["given"]): p for p in results.get(measure, {}).get("points", [])}
        points = []
        for given in (QUICK if options.quick else POINTS)[measure]:
            if json.dumps(given) not in known:
                found = point(measure, given, steps=3 if options.quick else 20)
                known[json.dumps(given)] = {"given": given, "found": found, "commit": commit()}
            points.append(known[json.dumps(given)])
            results[measure] = {"points": list(points)}
            write(name, {"machine": machine(), "measures": results})
        results[measure]["curves"] = curves(measure, points)
        report(measure, results[measure])
        write(name, {"machine": machine(), "measures": results})
    if not options.quick and any(measure != "processes" for measure in results):
        print(f"drawn: {draw(results).name}")


if __name__ == "__main__":
    main()
