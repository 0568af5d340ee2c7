"""Bytes that one of two processes under FSDP2 really holds and moves; a child of tests/test_cluster.py.

cluster_run.py MODEL OUTPUT BATCH_OF_ONE_PROCESS [--fsdp]
"""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from distributed_run import take_cpu_processes_for_devices
from tiny import tokens
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM


class Transfers(TorchDispatchMode):
    """Bytes received by the collectives that run inside, in order: (name, bytes)."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.__name__.split(".")[0]
        if function.namespace == "c10d" and name.strip("_") in ("allgather_base", "reduce_scatter_base"):
            sizes = [tensor.numel() * tensor.element_size() for tensor in args[:2]]
            self.seen.append((name.strip("_"), max(sizes) - min(sizes)))
        elif function.namespace == "c10d" and name != "barrier":
            self.seen.append((name, 0))
        return function(*args, **(kwargs or {}))


def held(tensors) -> int:
    return sum(t.to_local().numel() * t.to_local().element_size() for t in tensors if hasattr(t, "to_local"))


def main() -> None:
    folder, output, batch = sys.argv[1:4]
    torch.set_num_threads(1)
    take_cpu_processes_for_devices()
    accelerator = Accelerator(mixed_precision="bf16", cpu=True)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model, optimizer = accelerator.prepare(model, torch.optim.AdamW(model.parameters()))
    ids, transfers = tokens(int(batch), 12), Transfers()
    for step in range(2):  # the first one sets FSDP up
        with transfers:
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            forward = len(transfers.seen)
            accelerator.backward(loss)
        gradients = held(p.grad for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        if step == 0:
            transfers.seen.clear()
    states = [state[name] for state in optimizer.state.values() for name in ("exp_avg", "exp_avg_sq")]
    seen = {
        "wrapped": type(model).__name__,
        "weights": held(model.parameters()),
        "gradients": gradients,
        "adam": held(states),
        "forward": transfers.seen[:forward],
        "backward": transfers.seen[forward:],
    }
    Path(output).mkdir(exist_ok=True)
    if accelerator.is_main_process:
        torch.save(seen, f"{output}/seen.pt")
    accelerator.end_training()


if __name__ == "__main__":
    main()
