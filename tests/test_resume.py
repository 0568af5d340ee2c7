"""A search killed at any moment leaves whole checkpoints, and the resumed run is the uninterrupted one."""

import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import GPTNeoXConfig, Mamba2Config, Trainer, TrainerCallback, TrainerState

from modeling_manticore import ManticoreConfig, ManticoreForCausalLM, ManticoreTrainer, ManticoreTrainingArguments


STEPS, SAVE_STEPS, VOCABULARY = 12, 2, 48
PARTS = {"config.json", "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"}
PARTS |= {"strategy_state.json"}
# A fork server imports torch once; every run is a process of its own, started in a fraction of a second.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["modeling_manticore.search", "transformers.models.gpt_neox.modeling_gpt_neox"])


def build(mixture: str) -> ManticoreForCausalLM:
    """A supernet with dropout, so that a wrong random state shows."""
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}
    neox = GPTNeoXConfig(**sizes, num_attention_heads=2, intermediate_size=32, hidden_dropout=0.2)
    mamba = Mamba2Config(**sizes, num_heads=4, head_dim=8, state_size=4, n_groups=1, chunk_size=8, expand=2)
    torch.manual_seed(0)
    return ManticoreForCausalLM(ManticoreConfig.from_partition([neox, mamba], num_blocks=2, mixture=mixture))


def rows(count: int, seed: int) -> list[dict]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCABULARY, (count, 12), generator=generator)
    return [{"input_ids": row, "labels": row} for row in ids]


class KillAtStep(TrainerCallback):
    def __init__(self, step: int, after_backward: bool):
        self.step, self.after_backward = step, after_backward

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step and not self.after_backward:
            die()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if state.global_step == self.step and self.after_backward:
            die()


def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)


def kill_while_writing(moment: str, from_step: int) -> None:
    """Arrange for this process to be killed at one moment of writing the checkpoint of step `from_step` or later."""

    def due(folder: object) -> bool:
        return int(str(folder).rsplit("checkpoint-", 1)[1].split("/")[0]) >= from_step

    if moment == "model file written":
        original = Trainer._save_optimizer_and_scheduler
        Trainer._save_optimizer_and_scheduler = lambda self, folder: die() if due(folder) else original(self, folder)
    elif moment == "optimizer half written":
        save = torch.save

        def half(value, file):
            save(value, file)
            if str(file).endswith("optimizer.pt") and due(file):
                os.truncate(file, os.path.getsize(file) // 2)
                die()

        torch.save = half
    elif moment == "before the trainer state":
        write = TrainerState.save_to_json
        TrainerState.save_to_json = lambda self, file: die() if due(file) else write(self, file)
    elif moment in ("before the rename", "after the rename"):
        replace = os.replace

        def rename(source, target):
            ours = os.path.isdir(source) and Path(target).name.startswith("checkpoint-") and due(target)
            if ours and moment == "before the rename":
                die()
            replace(source, target)
            if ours:
                die()

        os.replace = rename
    elif moment == "an old checkpoint half deleted":
        remove = shutil.rmtree

        def half_remove(folder, *args, **kwargs):
            if re.fullmatch(r"(deleted-)?checkpoint-\d+", Path(folder).name) and Path(folder).is_dir():
                os.remove(Path(folder, "model.safetensors"))
                die()
            remove(folder, *args, **kwargs)

        shutil.rmtree = half_remove


MOMENTS = (
    "model file written",
    "optimizer half written",
    "before the trainer state",
    "before the rename",
    "after the rename",
    "an old checkpoint half deleted",
)


def run(folder: Path, mixture: str, resume: bool, kill_step: int | None, moment: str | None, options: dict) -> None:
    """One process: train, and write the final weights and the logs. It may kill itself on the way."""
    torch.set_num_threads(1)
    options = {"save_steps": SAVE_STEPS, "save_total_limit": 2} | options
    args = ManticoreTrainingArguments(
        output_dir=str(folder),
        stage="search",
        mixture_learning_rate=0.05,
        learning_rate=1e-3,
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=SAVE_STEPS,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    callbacks = [] if kill_step is None else [KillAtStep(kill_step, after_backward=kill_step % 2 == 0)]
    if moment is not None:
        kill_while_writing(moment, from_step=5)
    # 14 rows are 4 optimizer steps an epoch, the last one short.
    trainer = ManticoreTrainer(build(mixture), args, None, rows(14, 1), rows(4, 2), callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume or None)
    trainer.save_model(str(folder / "final"))
    (folder / "final" / "history.json").write_text(json.dumps(trainer.state.log_history))


def start(folder, mixture="softmax", resume=False, kill_step=None, moment=None, **options):
    process = PROCESSES.Process(target=run, args=(folder, mixture, resume, kill_step, moment, options))
    process.start()
    return process


def finish(folder, **kwargs) -> int:
    process = start(folder, **kwargs)
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def checkpoints(folder: Path) -> list[Path]:
    return sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def assert_whole(folder: Path) -> None:
    for checkpoint in checkpoints(folder):
        assert set(os.listdir(checkpoint)) >= PARTS, checkpoint
        load_file(checkpoint / "model.safetensors")
        torch.load(checkpoint / "optimizer.pt", weights_only=True)
        json.loads((checkpoint / "trainer_state.json").read_text())


def courses(folder: Path) -> list[dict]:
    """What was logged, but for the times."""
    history = json.loads((folder / "final" / "history.json").read_text())
    entries = [{k: v for k, v in entry.items() if "runtime" not in k and "_per_second" not in k} for entry in history]
    return [entry for entry in entries if "train_loss" not in entry]  # counts the steps of one process


def assert_same_run(folder: Path, reference: Path) -> None:
    got, expected = (load_file(path / "final" / "model.safetensors") for path in (folder, reference))
    assert got.keys() == expected.keys()
    assert max((got[name].double() - expected[name].double()).abs().max().item() for name in got) <= 1e-6
    for ours, theirs in zip(courses(folder), courses(reference), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)
    assert [path.name for path in checkpoints(folder)] == [path.name for path in checkpoints(reference)]
    assert (folder / "report" / "mixture_weights.png").stat().st_size > 1000
    assert not list(folder.glob("_*")) and not list(folder.glob(".*"))


@pytest.fixture(scope="module")
def references(tmp_path_factory) -> dict[str, Path]:
    """The uninterrupted runs."""
    folders = {mixture: tmp_path_factory.mktemp(mixture) for mixture in ("softmax", "gumbel_softmax")}
    processes = [start(folder, mixture) for mixture, folder in folders.items()]
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return folders


@pytest.mark.parametrize("seed", range(4))
def test_killed_at_a_random_step(tmp_path, references, seed):
    mixture = ("softmax", "gumbel_softmax")[seed % 2]
    step = random.Random(seed).randrange(1, STEPS)
    assert finish(tmp_path, mixture=mixture, kill_step=step) == -signal.SIGKILL
    assert_whole(tmp_path)
    assert finish(tmp_path, mixture=mixture, resume=bool(checkpoints(tmp_path))) == 0
    assert_same_run(tmp_path, references[mixture])


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_while_a_checkpoint_is_written(tmp_path, references, moment):
    assert finish(tmp_path, moment=moment) == -signal.SIGKILL
    assert_whole(tmp_path)
    assert list(tmp_path.glob("_*")), "the kill came when no checkpoint was being written"
    assert finish(tmp_path, resume=True) == 0
    assert_same_run(tmp_path, references["softmax"])


def test_killed_again_and_again_from_outside(tmp_path, references):
    clock = random.Random(7)
    for _ in range(4):
        seen = len(checkpoints(tmp_path))
        process = start(tmp_path, resume=bool(seen))
        deadline = time.monotonic() + 60
        while not checkpoints(tmp_path) and process.is_alive() and time.monotonic() < deadline:
            time.sleep(0.01)
        process.join(clock.uniform(0.0, 0.6))
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        assert_whole(tmp_path)
    assert finish(tmp_path, resume=True) == 0
    assert_same_run(tmp_path, references["softmax"])


def test_best_model_survives_a_resume(tmp_path):
    options = {"load_best_model_at_end": True, "save_total_limit": 1}
    reference, killed = tmp_path / "reference", tmp_path / "killed"
    assert finish(reference, **options) == 0
    assert finish(killed, kill_step=7, **options) == -signal.SIGKILL
    assert_whole(killed)
    assert finish(killed, resume=True, **options) == 0
    assert_same_run(killed, reference)
    best = checkpoints(killed)
    assert len(best) == 1
    kept, final = load_file(best[0] / "model.safetensors"), load_file(killed / "final" / "model.safetensors")
    assert all(torch.equal(kept[name], final[name]) for name in final)
