"""
What a step of every gradient strategy costs, as a multiple of the plain fine-tuning step of the same supernet.

All run through ManticoreTrainer on the same rows, each in a thread of its own, and take turns: a round is one step of
every variant, in an order of its own, while the others wait. The ratio of a round is the variant's step over the step
of "finetune" in that round. Reported are the median of the rounds' ratios and its 95 % interval (bootstrap over
rounds), by the clock and by processor time; "finetune again" is the noise of the measurement.
"""

import argparse
import random
import tempfile
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import torch
from _shared import quiet, write
from transformers import GPTNeoXConfig, Mamba2Config, TrainerCallback

from modeling_manticore import ManticoreConfig, ManticoreForCausalLM, ManticoreTrainer, ManticoreTrainingArguments


PLAIN = "finetune"
VARIANTS = {
    PLAIN: ("softmax", {"stage": "finetune"}),
    "finetune again": ("softmax", {"stage": "finetune"}),
    "joint": ("softmax", {"stage": "search", "strategy": "joint"}),
    "darts": ("softmax", {"stage": "search", "strategy": "darts"}),
    "gaea on joint": ("simplex", {"stage": "search", "strategy": "gaea"}),
    "gaea on darts": ("simplex", {"stage": "search", "strategy": "gaea", "gaea_base": "darts"}),
    "dash": ("gumbel_softmax", {"stage": "search", "strategy": "dash"}),
}
LIMITS = {"joint": 1.1, "darts": 2.2}


class Turns:
    """Who may run: one variant after the other, every round in another order."""

    def __init__(self, variants: list[str]):
        self.condition, self.random = threading.Condition(), random.Random(0)
        self.variants, self.queue, self.failed = variants, [], False

    def wait(self, variant: str) -> None:
        """Return when it is this variant's turn."""
        with self.condition:
            if not self.queue:
                self.queue = self.random.sample(self.variants, len(self.variants))
            self.condition.wait_for(lambda: self.failed or self.queue[0] == variant)
            if self.failed:
                raise RuntimeError(f"{variant}: another variant failed")

    def fail(self) -> None:
        """Nobody waits for a turn that will not end."""
        with self.condition:
            self.failed = True
            self.condition.notify_all()

    def done(self) -> None:
        """The turn is over."""
        with self.condition:
            self.queue.pop(0)
            if not self.queue:
                self.queue = self.random.sample(self.variants, len(self.variants))
            self.condition.notify_all()


class Clock(TrainerCallback):
    """Seconds and processor seconds of every step, from the turn's beginning to the end of the step."""

    def __init__(self, variant: str, turns: Turns):
        self.variant, self.turns, self.wall, self.processor = variant, turns, [], []
        self.began = None

    def begin(self) -> None:
        self.turns.wait(self.variant)
        self.began = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **kwargs):
        self.wall.append(time.perf_counter() - self.began[0])
        self.processor.append(time.process_time() - self.began[1])
        self.turns.done()
        if state.global_step < state.max_steps:
            self.begin()


def interval(values: list[float], resamples: int = 4000) -> list[float]:
    """95 % bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(median(draw.choices(values, k=len(values))) for _ in range(resamples))
    return [medians[int(0.025 * resamples)], medians[int(0.975 * resamples) - 1]]


def supernet(mixture: str, given: argparse.Namespace) -> ManticoreForCausalLM:
    """A Transformer and a Mamba-2 side by side, with random weights."""
    sizes = {"vocab_size": 4096, "hidden_size": given.width, "num_hidden_layers": given.layers}
    torch.manual_seed(0)
    neox = GPTNeoXConfig(**sizes, num_attention_heads=4, intermediate_size=4 * given.width)
    mamba = Mamba2Config(**sizes, num_heads=8, head_dim=given.width // 4, state_size=32, n_groups=1, chunk_size=64)
    return ManticoreForCausalLM(ManticoreConfig.from_partition([neox, mamba], given.blocks, mixture=mixture))


def rows(count: int, length: int, seed: int) -> list[dict]:
    """Random token ids."""
    ids = torch.randint(0, 4096, (count, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


def train(variant: str, folder: str, given: argparse.Namespace, clock: Clock) -> None:
    """`train_in_turns`; an error ends the others too."""
    try:
        train_in_turns(variant, folder, given, clock)
    except BaseException:
        traceback.print_exc()
        clock.turns.fail()
        raise


def train_in_turns(variant: str, folder: str, given: argparse.Namespace, clock: Clock) -> None:
    """One training; its first turn includes what comes before the first step, and is not counted."""
    torch.set_num_threads(1)
    clock.begin()
    mixture, own = VARIANTS[variant]
    args = ManticoreTrainingArguments(
        output_dir=folder,
        max_steps=given.rounds + 2,
        per_device_train_batch_size=given.batch,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **own,
    )
    search = {"search_dataset": rows(64, given.length, 2)} if "darts" in variant else {}
    model, data = supernet(mixture, given), rows(64, given.length, 1)
    ManticoreTrainer(model, args, train_dataset=data, callbacks=[clock], **search).train()


def main() -> None:
    """Print the table and write `results/search_overhead.json`; an error where a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="measured steps of every variant")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=128, help="tokens per row")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4, help="of each component")
    parser.add_argument("--blocks", type=int, default=2)
    given = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    turns = Turns(list(VARIANTS))
    clocks = {variant: Clock(variant, turns) for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(len(VARIANTS)) as pool:
        jobs = [
            pool.submit(train, variant, f"{folder}/{i}", given, clocks[variant]) for i, variant in enumerate(VARIANTS)
        ]
        for job in jobs:
            job.result()
    table = {}
    for variant, clock in clocks.items():
        table[variant] = {"limit": LIMITS.get(variant)}
        for kind in ("wall", "processor"):
            values, plain = (getattr(c, kind)[2:] for c in (clock, clocks[PLAIN]))
            ratios = [value / other for value, other in zip(values, plain)]
            table[variant][kind] = {"seconds": median(values), "ratio": median(ratios), "interval": interval(ratios)}
        shown = (
            f"{found['ratio']:.3f} [{found['interval'][0]:.3f}, {found['interval'][1]:.3f}]"
            for found in (table[variant]["wall"], table[variant]["processor"])
        )
        print(f"{variant:15} {table[variant]['wall']['seconds']:7.3f} s   {'   '.join(shown)}")
    write("search_overhead", {"options": vars(given), "table": table})
    over = [variant for variant, limit in LIMITS.items() if table[variant]["wall"]["ratio"] > limit]
    if over:
        raise SystemExit(f"over the limit: {', '.join(over)}")


if __name__ == "__main__":
    main()
