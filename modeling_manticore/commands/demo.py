"""`manticore demo`: compose, calibrate, search, discretize, fine-tune, save, reload without the package, generate."""

from dataclasses import dataclass, field

from .parsing import TEXT_CACHE, parse_options, require, require_positive


@dataclass
class DemoOptions:
    output_folder: str = field(
        default="runs/demo", metadata={"help": "Where the hybrid, table and plots are written."}
    )
    cache_folder: str | None = field(
        default=None, metadata={"help": TEXT_CACHE.replace("texts", "texts and trained components")}
    )
    texts: list[str] = field(
        default_factory=lambda: ["bible", "python"],
        metadata={"help": "Two or more texts: bible, python, topics, or .txt/.jsonl files and folders."},
    )
    domains: list[str] = field(
        default_factory=lambda: ["prose", "code"], metadata={"help": "A name for each text, for the table."}
    )
    components: list[str] | None = field(
        default=None,
        metadata={
            "help": "Two or more repositories or folders of pretrained models with one tokenizer. By default a small "
            "GPT-NeoX is trained on the first text and a small Mamba-2 on the second."
        },
    )
    num_blocks: int = field(default=2, metadata={"help": "Blocks that every component is cut into."})
    gate: str = field(default="routed", metadata={"help": "Gate of the projectors: routed, mixture, none or learned."})
    steps: int = field(default=150, metadata={"help": "Training steps of every fine-tuned row."})
    search_steps: int | None = field(
        default=None, metadata={"help": "Training steps of the search (default: 2/3 of steps)."}
    )
    component_steps: int | None = field(
        default=None, metadata={"help": "Training steps of the demo's own components (default: 3 times steps)."}
    )
    batch_size: int = field(default=8, metadata={"help": "Rows per step."})
    row_length: int = field(default=128, metadata={"help": "Tokens per row."})
    calibration_rows: int = field(default=256, metadata={"help": "Rows that projectors are fitted on."})
    eval_rows: int = field(default=128, metadata={"help": "Test rows of each text."})
    learning_rates: list[float] | None = field(
        default=None,
        metadata={
            "help": "Learning rate of continued training of each component (default: 4e-3 for the demo's own, 1e-4 "
            "for given ones)."
        },
    )
    learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of the hybrids' fine-tuning (default: 2e-3, with given components 1e-4)."},
    )
    search_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate of weights in the search (default: 1e-3, with given components 1e-4)."},
    )
    mixture_learning_rate: float = field(default=0.1, metadata={"help": "Learning rate of the mixture weights."})
    component_learning_rate: float = field(default=3e-3, metadata={"help": "Learning rate of the demo's components."})
    hidden_size: int = field(default=192, metadata={"help": "Width of the demo's components."})
    num_layers: int = field(default=6, metadata={"help": "Depth of the demo's components."})
    vocab_size: int = field(default=4096, metadata={"help": "Size of the demo's tokenizer."})
    max_characters: int = field(default=5_000_000, metadata={"help": "At most about so many characters of each text."})
    seed: int = field(default=0, metadata={"help": "Seed of splits, initial weights and orders."})
    workers: int = field(default=2, metadata={"help": "Trainings at a time, one thread each."})
    retrain: bool = field(default=False, metadata={"help": "Train the components even if the cache has them."})

    def __post_init__(self):
        require_positive(
            self, "num_blocks", "steps", "search_steps", "component_steps", "batch_size", "calibration_rows"
        )
        require_positive(self, "eval_rows", "num_layers", "max_characters", "workers")
        require(self.row_length >= 2, f"row_length: got {self.row_length}, allowed is at least 2.")
        require(self.hidden_size >= 8 and self.hidden_size % 8 == 0, "hidden_size: allowed are multiples of 8.")
        require(len(self.texts) >= 2, f"texts: got {len(self.texts)}, allowed are two or more.")
        require(
            len(self.domains) == len(self.texts) == len(set(self.domains)),
            f"domains: got {self.domains!r}, allowed is one name for each of the {len(self.texts)} texts.",
        )
        require(
            self.components is not None or len(self.texts) == 2,
            f"texts: got {len(self.texts)}, allowed are two, unless components are given.",
        )
        require(
            self.components is None or len(self.components) >= 2,
            "components: got fewer than two, allowed are two or more.",
        )
        count = 2 if self.components is None else len(self.components)
        own = self.components is None
        if self.learning_rates is None:
            self.learning_rates = [4e-3 if own else 1e-4] * count
        if self.learning_rate is None:
            self.learning_rate = 2e-3 if own else 1e-4
        if self.search_learning_rate is None:
            self.search_learning_rate = 1e-3 if own else 1e-4
        require(
            len(self.learning_rates) == count,
            f"learning_rates: got {len(self.learning_rates)}, allowed is one for each of {count} components.",
        )
        for name in ("learning_rate", "search_learning_rate", "mixture_learning_rate", "component_learning_rate"):
            require(getattr(self, name) > 0, f"{name}: got {getattr(self, name)}, allowed is a positive number.")
        require(
            min(self.learning_rates) > 0, f"learning_rates: got {self.learning_rates}, allowed are positive numbers."
        )
        if self.search_steps is None:
            self.search_steps = max(1, self.steps * 2 // 3)
        if self.component_steps is None:
            self.component_steps = 3 * self.steps


KINDS = (DemoOptions,)


def run(arguments: list[str]) -> None:
    """
    Raises:
        ValueError: bad options, texts or components.
    """
    (options,) = parse_options(KINDS, arguments, "demo")

    from transformers.utils import logging

    from .demo_run import Demo

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    Demo(options).run()
