"""The stages of the demo, in order, and the rows of its table."""

import copy
import json
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from .. import ManticoreForCausalLM, calibrate, discretize
from ..hub.cards import architecture, write_card
from ..search.history import plot_mixtures
from ..tasks.text import interleave
from . import demo_reload
from .demo_components import given_components, own_components, pack_domains, read_splits
from .demo_jobs import Job, child_environment, run_jobs, save_rows
from .demo_report import Row, card_arguments, plot_losses, table, write_json
from .models import check_output, measure


PROMPTS = ["And the LORD said unto Moses,", "def __init__(self, "]
RELOAD_TOLERANCE = 1e-5
RELOAD_TIMEOUT = 600


class Demo:
    """
    One run. All weights start from the components as they are on disk; the search decides only which path every block
    keeps, so that each fine-tuned row has seen the same rows, in the same order, for the same number of steps.
    """

    def __init__(self, options):
        self.options = options
        self.output = check_output(options.output_folder).resolve()
        self.rows: list[Row] = []
        self.histories: dict[str, list[dict]] = {}
        self.facts: dict = {}

    def run(self) -> None:
        """All stages. Writes `hybrid/` with its card, `table.json`, `mixture_weights.png` and `losses.png`."""
        start = time.perf_counter()
        self.prepare()
        self.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.output, prefix=".work-") as folder:
            self.work = Path(folder)
            self.write_rows()
            self.compose()
            self.train_side_by_side()
            hybrid, job = self.searched_hybrid()
            self.save_and_reload(hybrid, job)
        self.facts["total_seconds"] = time.perf_counter() - start
        self.report(hybrid)

    # ------------------------------------------------------------------ texts and components
    def prepare(self) -> None:
        """Texts, tokenizer, components, and the rows that every stage reads."""
        options = self.options
        start = time.perf_counter()
        splits = read_splits(options)
        print(f"texts: {', '.join(options.texts)} in {time.perf_counter() - start:.0f} s")
        if options.components is None:
            self.components, self.tokenizer = own_components(options, splits)
        else:
            self.components, self.tokenizer = given_components(options)
        self.domains = pack_domains(splits, self.tokenizer, options)
        seed, train = options.seed, [domain.train for domain in self.domains]
        search = [domain.search for domain in self.domains]
        self.calibration_rows = interleave(search, options.calibration_rows, seed)
        self.search_rows = interleave(search, options.search_steps * options.batch_size, seed + 1)
        self.train_rows = interleave(train, options.steps * options.batch_size, seed + 2)

    def write_rows(self) -> None:
        """Rows in files, for the training processes."""
        probe = torch.cat([domain.test[:1] for domain in self.domains])
        self.files = {
            name: save_rows(rows, self.work / f"{name}.safetensors")
            for name, rows in (("search", self.search_rows), ("train", self.train_rows), ("probe", probe))
        }

    def measured(self, model: PreTrainedModel) -> dict[str, dict[str, float]]:
        """Test loss and its standard error by domain, as a row has them."""
        found = {d.name: measure(model, d.test[: self.options.eval_rows]) for d in self.domains}
        pairs = (("losses", "loss"), ("standard_errors", "standard_error"))
        return {field: {name: one[key] for name, one in found.items()} for field, key in pairs}

    def add(self, name: str, model: PreTrainedModel, seconds: float | None, **more) -> Row:
        """Measure a model and add its row."""
        parameters = sum(p.numel() for p in model.parameters())
        row = Row(name, parameters=parameters, seconds=seconds, **self.measured(model), **more)
        self.rows.append(row)
        print(f"{name}: mean test loss {row.mean:.3f}")
        return row

    # ------------------------------------------------------------------ supernet
    def compose(self) -> None:
        """Components, and the supernet before and after calibration."""
        options = self.options
        for component in self.components:
            model = AutoModelForCausalLM.from_pretrained(component.folder)
            steps = options.component_steps if component.seconds is not None else 0
            note = f"{steps} steps on its own text" if steps else "as given"
            rate = options.component_learning_rate if steps else None
            self.add(component.name, model, component.seconds, steps=steps, learning_rate=rate, note=note)
        start = time.perf_counter()
        self.plain = ManticoreForCausalLM.from_components(
            [component.folder for component in self.components], num_blocks=options.num_blocks, gate=options.gate
        )
        self.add("supernet, identity projectors", self.plain, time.perf_counter() - start)
        start = time.perf_counter()
        self.supernet = copy.deepcopy(self.plain)
        report = calibrate(self.supernet, self.calibration_rows, batch_size=options.batch_size)
        seconds = time.perf_counter() - start
        print(report)
        self.add("supernet, calibrated", self.supernet, seconds)

    def fixed_choice(self) -> list[int]:
        """The first component's first half, then the last component's second half."""
        blocks, last = self.options.num_blocks, len(self.components) - 1
        return [0 if b < (blocks + 1) // 2 else last for b in range(blocks)]

    def cut(self, choice: list[int], name: str) -> PreTrainedModel:
        """A discretized hybrid with identity bridges and with fitted ones, a row for each; returns the fitted one."""
        start = time.perf_counter()
        plain = discretize(self.plain, choice, refit=False)
        before = self.add(f"{name}, identity bridges", plain, time.perf_counter() - start)
        start = time.perf_counter()
        hybrid = discretize(
            self.supernet, choice, calibration=self.calibration_rows, batch_size=self.options.batch_size
        )
        after = self.add(f"{name}, calibrated", hybrid, time.perf_counter() - start)
        self.facts.setdefault("calibration_gain", {})[name] = before.mean - after.mean
        return hybrid

    # ------------------------------------------------------------------ training
    def job(self, name: str, model: str, learning_rate: float, **more) -> Job:
        """A fine-tuning job on the rows of both domains."""
        options = self.options
        settings = {"rows": self.files["train"], "steps": options.steps, "seed": options.seed} | more
        return Job(
            name=name,
            model=model,
            output=str(self.work / name.replace(" ", "_")),
            batch_size=options.batch_size,
            learning_rate=learning_rate,
            **settings,
        )

    def train_side_by_side(self) -> None:
        """The search, each component continued, and the fixed hybrid fine-tuned: all independent of each other."""
        options = self.options
        self.fixed = self.cut(self.fixed_choice(), "fixed hybrid")
        supernet, fixed = self.work / "supernet", self.work / "fixed"
        self.supernet.save_pretrained(supernet)
        self.fixed.save_pretrained(fixed)
        search = self.job(
            "search",
            str(supernet),
            options.search_learning_rate,
            rows=self.files["search"],
            steps=options.search_steps,
            stage="search",
            search_options={"strategy": "joint", "mixture_learning_rate": options.mixture_learning_rate},
        )
        continued = [
            self.job(f"fine-tune component {k}", component.folder, rate)
            for k, (component, rate) in enumerate(zip(self.components, options.learning_rates))
        ]
        self.fixed_job = self.job("fine-tune fixed", str(fixed), options.learning_rate, probe=self.files["probe"])
        run_jobs([search, *continued, self.fixed_job], options.workers)

        rows, self.rows = self.rows, []
        self.continued = [
            self.add_trained(f"{component.name}, fine-tuned", job)
            for component, job in zip(self.components, continued)
        ]
        count = len(self.components)
        rows[count:count] = self.rows
        self.rows = rows
        self.searched = AutoModelForCausalLM.from_pretrained(search.output)
        self.add(
            "supernet, searched",
            self.searched,
            search.result()["seconds"],
            steps=options.search_steps,
            learning_rate=options.search_learning_rate,
            note=f"{options.search_steps} steps on the search split",
        )
        self.search_history = search.history()
        self.facts["mixture_weights"] = [point.tolist() for point in self.searched.mixture_weights()]
        self.fixed_row = self.add_trained("fixed hybrid, fine-tuned", self.fixed_job)

    def add_trained(self, name: str, job: Job) -> Row:
        """The row of a finished fine-tuning job."""
        model = AutoModelForCausalLM.from_pretrained(job.output)
        self.histories[name] = job.history()
        note = f"{job.steps} steps, learning rate {job.learning_rate:g}"
        return self.add(
            name, model, job.result()["seconds"], steps=job.steps, learning_rate=job.learning_rate, note=note
        )

    def searched_hybrid(self) -> tuple[PreTrainedModel, Job]:
        """Cut the supernet as the search says and fine-tune; returns the hybrid to keep and the job that made it."""
        choice = [int(point.argmax()) for point in self.searched.mixture_weights()]
        self.facts["searched_choice"] = choice
        self.facts["fixed_choice"] = self.fixed_choice()
        self.best_row, kept = self.fixed_row, self.fixed_job
        if choice == self.fixed_choice():
            print(f"the search chose {choice}: the fixed hybrid")
            self.facts["search_outcome"] = "the fixed hybrid"
        elif len(set(choice)) == 1:
            name = self.components[choice[0]].name
            print(f"the search chose {choice}, a pure choice: {name} itself; its rows stand for it")
            self.facts["search_outcome"] = f"pure: {name}"
        else:
            self.facts["search_outcome"] = "a hybrid"
            print(f"the search chose {choice}")
            folder = self.work / "searched"
            self.cut(choice, "searched hybrid").save_pretrained(folder)
            kept = self.job(
                "fine-tune searched",
                str(folder),
                self.options.learning_rate,
                probe=self.files["probe"],
                threads=self.options.workers,
            )
            run_jobs([kept], 1)
            self.best_row = self.add_trained("searched hybrid, fine-tuned", kept)
        return AutoModelForCausalLM.from_pretrained(kept.output), kept

    # ------------------------------------------------------------------ save, reload, report
    def save_and_reload(self, hybrid: PreTrainedModel, job: Job) -> None:
        """
        Save, load in a process where the package does not exist, compare logits, generate.

        Raises:
            RuntimeError: the process failed, keys were wrong, or the logits differ.
        """
        folder = self.output / "hybrid"
        hybrid.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        logits, modules = self.work / "logits.safetensors", self.work / "modules"
        command = [sys.executable, "-I", demo_reload.__file__, str(folder.resolve()), self.files["probe"]]
        command += [str(logits), json.dumps(self.prompts()), str(job.threads)]
        environment = child_environment(job.threads) | {"HF_MODULES_CACHE": str(modules), "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=environment,
            cwd=self.work,
            timeout=RELOAD_TIMEOUT,
        )
        if done.returncode != 0:
            raise RuntimeError(f"reloading without the package failed\n{done.stderr[-3000:]}")
        answer = json.loads(done.stdout.splitlines()[-1])
        before = load_file(str(Path(job.output) / "probe.safetensors"))["logits"]
        difference = (load_file(str(logits))["logits"] - before).abs().max().item()
        if answer["wrong_keys"] or not difference <= RELOAD_TOLERANCE:
            raise RuntimeError(f"the reloaded hybrid differs: {difference:.2e}, keys {answer['wrong_keys']}")
        print("\nsaved, then loaded in a process without this package: ", end="")
        print("logits bit-equal" if difference == 0 else f"largest difference of a logit {difference:.1e}")
        for text in answer["texts"]:
            print(f"  | {text!r}")
        print(f"\n{hybrid.describe()}")
        self.facts["reload"] = {"largest_difference": difference, "texts": answer["texts"]}

    def prompts(self) -> list[str]:
        """One beginning of text for each domain."""
        if self.options.texts == ["bible", "python"]:
            return PROMPTS
        return [self.tokenizer.decode(domain.test[0][:8]) for domain in self.domains]

    def verdict(self) -> list[str]:
        """Whether the hybrid beats every component continued with the same tokens, whichever it is."""
        options = self.options
        lines = []
        for name, gain in self.facts["calibration_gain"].items():
            lines.append(f"{name}: calibration instead of identity bridges lowers the loss by {gain:.3f} nats")
        best = min(row.mean for row in self.continued)
        tokens = self.facts["tokens"] = options.steps * options.batch_size * options.row_length
        hybrids = {self.fixed_row.name: self.fixed_row, self.best_row.name: self.best_row}
        for row in hybrids.values():
            word = "below" if row.mean < best else "NOT below"
            others = ", ".join(f"{other.name} {other.mean:.3f}" for other in self.continued)
            lines.append(f"{row.name}: {row.mean:.3f}, {word} every continued component ({others})")
        lines.append(f"every fine-tuned row: the same {tokens:,} tokens of all domains in the same order")
        return lines

    def report(self, hybrid: PreTrainedModel) -> None:
        """The table, its JSON, the card that is made of it, the two plots, and the last lines."""
        verdict = self.verdict()
        names = [
            [f"{self.components[p['component']].name} {p['start']}:{p['stop']}" for p in block]
            for block in self.supernet.config.blocks
        ]
        plot_mixtures(self.search_history, self.output / "mixture_weights.png", names)
        plot_losses(self.output / "losses.png", self.rows, self.histories)
        self.facts["versions"] = {"python": platform.python_version()} | {
            name: version(name) for name in ("modeling-manticore", "torch", "transformers")
        }
        self.facts["kept"] = self.best_row.name
        self.facts["hybrid"] = architecture(hybrid)
        self.facts["blocks"] = [
            {"paths": paths, "weights": weights} for paths, weights in zip(names, self.facts["mixture_weights"])
        ]
        table_file = self.output / "table.json"
        write_json(table_file, self.rows, verdict=verdict, settings=asdict(self.options), **self.facts)
        card = write_card(self.output / "hybrid", hybrid, **card_arguments(json.loads(table_file.read_text())))
        print("\n".join(["", *verdict, f"{self.facts['total_seconds']:.0f} seconds in all", "", table(self.rows), ""]))
        print(f"card:   {card}")
        print(f"hybrid: {self.output / 'hybrid'}")
        print(f"plots:  {self.output / 'mixture_weights.png'}, {self.output / 'losses.png'}")
        print(f"table:  {table_file}")
