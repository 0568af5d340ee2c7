"""
Memory of building a discretized hybrid of half of each of two components, in a child process each:

    private   peak of private anonymous memory above the interpreter with its imports, as a share of the hybrid's bytes
    planned   what `plan` says of that peak beforehand, as a multiple of it; its parameters and bytes must be exact
    file      peak of resident pages of the checkpoints' files, as a share of the bytes of the layers used

    python benchmarks/building_memory.py [--megabytes 400]
"""

import argparse
import json
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import torch
from _shared import quiet, write
from transformers import AutoModelForCausalLM, LlamaConfig, Mamba2Config


CASES = {
    "same dtype": {"dtype": "float32", "shards": "5GB"},
    "converted": {"dtype": "bfloat16", "shards": "5GB"},
    "same dtype, many shards": {"dtype": "float32", "shards": "40MB"},
    "converted, many shards": {"dtype": "bfloat16", "shards": "40MB"},
}
LIMITS = {"float32": 0.3, "bfloat16": 1.3}
FILE_LIMIT = 1.2
PLAN_LIMIT = 0.15  # how far a planned peak may be off where tensors are converted


def make_components(folder: Path, megabytes: int, shards: str) -> list[Path]:
    """A Llama and a Mamba-2 of about so many megabytes each in float32."""
    layers = 16
    width = max(64, int((megabytes * 2**20 / 4 / layers / 16) ** 0.5) // 64 * 64)  # about 16 width^2 a layer
    llama = LlamaConfig(
        vocab_size=1024,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
    )
    mamba = Mamba2Config(
        vocab_size=1024,
        hidden_size=width,
        num_hidden_layers=layers * 5 // 2,
        expand=2,
        head_dim=64,
        num_heads=2 * width // 64,
        n_groups=1,
        state_size=64,
    )
    folders = []
    for config in (llama, mamba):
        torch.manual_seed(0)
        folders.append(folder / config.model_type)
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[-1], max_shard_size=shards)
    return folders


def memory() -> dict[str, int]:
    """
    Bytes of this process: private anonymous pages, and resident pages of safetensors files. The kernel's own sum has
    the former: in `smaps`, read in pieces, a mapping that has grown since the last piece stands twice.
    """
    found, name = {"private": 0, "file": 0}, ""
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            found["private"] = int(line.split()[1]) * 1024
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if not words[0].endswith(":"):
            name = words[5] if len(words) > 5 else ""
        elif words[0] == "Rss:" and name.endswith(".safetensors"):
            found["file"] += int(words[1]) * 1024
    return found


def halves(folders: list) -> list[list[dict[str, int]]]:
    """Blocks: the first half of the one component, then the second half of the other."""
    first, second = (json.loads(Path(folder, "config.json").read_text())["num_hidden_layers"] for folder in folders)
    return [
        [{"component": 0, "start": 0, "stop": first // 2}],
        [{"component": 1, "start": second // 2, "stop": second}],
    ]


def planned(folders: list, dtype: str) -> dict[str, int]:
    """What a plan says of the same hybrid: its parameters, its bytes, and the peak of building it."""
    from modeling_manticore.hub.plan import plan
    from modeling_manticore.hub.recipes import recipe_from_dict

    components = [{"folder": str(folder)} for folder in folders]
    made = plan(recipe_from_dict({"name": "x", "components": components, "blocks": halves(folders), "dtype": dtype}))
    made.check()
    return {"parameters": made.hybrid.parameters, "bytes": made.hybrid.bytes, "peak": made.building.private_bytes}


def build(folders: list[str], dtype: str) -> dict[str, float]:
    """In the child: build, and say what it took."""
    from modeling_manticore import ManticoreForCausalLM
    from modeling_manticore.mixing_manticore import Projector

    blocks = halves(folders)
    before, done = memory(), threading.Event()
    peak = dict(before)

    def watch():
        while not done.is_set():
            peak.update({kind: max(peak[kind], value) for kind, value in memory().items()})

    watcher = threading.Thread(target=watch)
    watcher.start()
    hybrid = ManticoreForCausalLM.from_components(folders, blocks=blocks, dtype=dtype)
    done.set()
    watcher.join()
    peak.update({kind: max(peak[kind], value) for kind, value in memory().items()})
    size = sum(p.numel() * p.element_size() for p in hybrid.parameters())
    joints = sum(p.numel() for m in hybrid.modules() if isinstance(m, Projector) for p in m.parameters())
    used = (sum(p.numel() for p in hybrid.parameters()) - joints) * 4
    return {
        "hybrid_parameters": sum(p.numel() for p in hybrid.parameters()),
        "hybrid_bytes": size,
        "private": (peak["private"] - before["private"]) / size,
        "file": (peak["file"] - before["file"]) / used,
    }


def measure(megabytes: int, case: dict[str, str]) -> dict[str, float]:
    """One case in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        folders = make_components(Path(folder), megabytes, case["shards"])
        command = [sys.executable, __file__, "--build", *map(str, folders), "--dtype", case["dtype"]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
        if done.returncode:
            raise RuntimeError(done.stderr[-2000:])
        found = json.loads(done.stdout.splitlines()[-1])
        said = planned(folders, case["dtype"])
    exact = (said["parameters"], said["bytes"]) == (found["hybrid_parameters"], found["hybrid_bytes"])
    found |= {"planned": said["peak"] / (found["private"] * found["hybrid_bytes"]), "plan_is_exact": exact}
    return found | {"bound": LIMITS[case["dtype"]], "file_bound": FILE_LIMIT, "plan_bound": PLAN_LIMIT}


def is_within(row: dict[str, float]) -> bool:
    """Whether a case keeps the bounds; the plan's peak counts where tensors are converted, else it is a few MB."""
    close = abs(row["planned"] - 1) <= row["plan_bound"] or row["bound"] == LIMITS["float32"]
    return row["private"] <= row["bound"] and row["file"] <= row["file_bound"] and row["plan_is_exact"] and close


def main() -> None:
    """Print the table and write `results/building_memory.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=400)
    parser.add_argument("--build", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--dtype", help=argparse.SUPPRESS)
    options = parser.parse_args()
    quiet()
    if options.build:
        print(json.dumps(build(options.build, options.dtype)))
        return
    rows = {name: measure(options.megabytes, case) for name, case in CASES.items()}
    for name, row in rows.items():
        size = row["hybrid_bytes"] / 2**20
        print(
            f"{name:<25} {size:6.0f} MB  private {row['private']:.3f} (at most {row['bound']})  "
            f"planned {row['planned']:.3f}  file {row['file']:.3f}"
        )
    write("building_memory", {"megabytes": options.megabytes, "cases": rows})
    bad = [name for name, row in rows.items() if not is_within(row)]
    if bad:
        raise SystemExit(f"beyond the bounds: {', '.join(bad)}")


if __name__ == "__main__":
    main()
