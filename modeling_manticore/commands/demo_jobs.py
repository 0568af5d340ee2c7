"""Training jobs of the demo: child processes, a few at a time, with one progress bar each."""

import json
import os
import queue
import subprocess
import sys
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from ..processes import small_process
from ..progress import progress_bar


PROGRESS = "progress: "  # what a training process puts before the lines meant for its parent


@dataclass
class Job:
    """
    What `demo_worker.work` reads.

    Args:
        model: folder or repository of the model that is trained. output: folder of the result.
        rows: safetensors file with the training rows, (rows, length). probe: the same, for logits to keep.
        stage, search_options: of `ManticoreTrainingArguments`, for hybrids.
    """

    name: str
    model: str
    output: str
    rows: str
    steps: int
    batch_size: int
    learning_rate: float
    seed: int
    threads: int = 1
    stage: str = "finetune"
    search_options: dict = field(default_factory=dict)
    probe: str | None = None

    def result(self) -> dict:
        """The finished job's seconds."""
        return json.loads((Path(self.output) / "result.json").read_text())

    def history(self) -> list[dict]:
        """The finished job's log, as in `TrainerState`."""
        return json.loads((Path(self.output) / "history.json").read_text())


def save_rows(rows: torch.LongTensor, file: Path) -> str:
    """Write rows where a job can read them; returns the path."""
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"rows": rows.contiguous()}, file)
    return str(file)


def child_environment(threads: int) -> dict[str, str]:
    """The environment for a process that shares a small machine."""
    return os.environ | small_process(threads)


def run_jobs(jobs: list[Job], workers: int = 2) -> None:
    """
    Run all jobs, `workers` at a time, each in a process of its own.

    Raises:
        RuntimeError: a job failed; with the end of what it printed. The others are stopped.
    """
    running: list[subprocess.Popen] = []
    lock, stopped = threading.Lock(), threading.Event()
    places: queue.SimpleQueue = queue.SimpleQueue()
    for place in range(workers):
        places.put(place)
    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(_run, job, places, running, lock, stopped) for job in jobs]
        try:
            ended, _ = wait(futures, return_when=FIRST_EXCEPTION)
        finally:
            with lock:
                stopped.set()
                for process in running:
                    if process.poll() is None:
                        process.terminate()
    for future in ended:
        future.result()


def _run(job: Job, places: queue.SimpleQueue, running: list, lock: threading.Lock, stopped: threading.Event) -> None:
    output = Path(job.output)
    output.mkdir(parents=True, exist_ok=True)
    description = output / "job.json"
    description.write_text(json.dumps(asdict(job), indent=2) + "\n")
    command = [sys.executable, "-m", "modeling_manticore.commands.demo_worker", str(description)]
    place = places.get()
    try:
        with open(output / "messages.txt", "w+", encoding="utf-8") as messages:
            with lock:
                if stopped.is_set():
                    return
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=messages,
                    text=True,
                    env=child_environment(job.threads),
                )
                running.append(process)
            _follow(process, job, place)
            if process.wait() != 0:
                messages.seek(0)
                tail = "".join(messages.readlines()[-15:])
                raise RuntimeError(f"{job.name}: training failed with exit code {process.returncode}\n{tail}")
    finally:
        places.put(place)


def _follow(process: subprocess.Popen, job: Job, place: int) -> None:
    with progress_bar(total=job.steps, desc=f"{job.name:<28}", unit="step", position=place, maxinterval=60) as bar:
        for line in process.stdout:
            if not line.startswith(PROGRESS):
                continue
            news = json.loads(line.removeprefix(PROGRESS))
            if "step" in news:
                bar.update(news["step"] - bar.n)
            if "loss" in news:
                bar.set_postfix(loss=f"{news['loss']:.3f}", refresh=False)
