"""`manticore compose`: pretrained components -> a calibrated supernet in a folder."""

import json
from dataclasses import dataclass, field

from .parsing import TEXT_CACHE, parse_options, require, require_positive


@dataclass
class ComposeOptions:
    components: list[str] = field(metadata={"help": "Repositories or local folders (safetensors), two or more."})
    output_folder: str = field(metadata={"help": "Where the supernet and its tokenizer are written."})
    num_blocks: int | None = field(default=None, metadata={"help": "Cut every component evenly into so many blocks."})
    blocks: str | None = field(
        default=None,
        metadata={
            "help": "Instead of num_blocks, the architecture as JSON: a list of blocks, each a list of paths "
            '{"component": 0, "start": 0, "stop": 3}.'
        },
    )
    gate: str = field(default="routed", metadata={"help": "Gate of the projectors: routed, mixture, none or learned."})
    mixture: str = field(
        default="softmax",
        metadata={"help": "Parametrisation of the mixture weights: softmax, gumbel_softmax or simplex."},
    )
    project_ends: bool = field(default=True, metadata={"help": "Projectors between stems, heads and the stream."})
    projector_init: str = field(
        default="identity", metadata={"help": "Projectors before calibration: identity or random."}
    )
    hidden_size: int | None = field(
        default=None, metadata={"help": "Width of the stream (default: of the widest component)."}
    )
    tokenizer_from: int = field(default=0, metadata={"help": "Index of the component whose tokenizer is used."})
    dtype: str = field(default="auto", metadata={"help": "Of the weights: auto, float32, bfloat16 or float16."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow components with code of their own."})
    calibration_texts: list[str] | None = field(
        default=None,
        metadata={"help": "bible, python, topics, or .txt/.jsonl files and folders; without them no calibration."},
    )
    calibration_rows: int = field(default=256, metadata={"help": "Rows of calibration text."})
    row_length: int = field(default=128, metadata={"help": "Tokens per row."})
    batch_size: int = field(default=8, metadata={"help": "Rows per batch."})
    order: str = field(default="sequential", metadata={"help": "Order of calibration: sequential or parallel."})
    cache_folder: str | None = field(default=None, metadata={"help": TEXT_CACHE})


KINDS = (ComposeOptions,)


def run(arguments: list[str]) -> None:
    """
    Raises:
        ValueError: bad options or components.
    """
    (options,) = parse_options(KINDS, arguments, "compose")
    require_positive(options, "num_blocks", "calibration_rows", "row_length", "batch_size")
    require(
        (options.num_blocks is None) != (options.blocks is None),
        "num_blocks, blocks: give exactly one of the two.",
    )
    blocks = None
    if options.blocks is not None:
        try:
            blocks = json.loads(options.blocks)
        except json.JSONDecodeError as error:
            raise ValueError(f"blocks: it is not JSON ({error.msg}).") from error

    from .. import ManticoreForCausalLM, calibrate
    from .models import check_output, load_tokenizer, rows_of

    folder = check_output(options.output_folder)
    model = ManticoreForCausalLM.from_components(
        options.components,
        num_blocks=options.num_blocks,
        blocks=blocks,
        gate=options.gate,
        mixture=options.mixture,
        project_ends=options.project_ends,
        projector_init=options.projector_init,
        hidden_size=options.hidden_size,
        tokenizer_from=options.tokenizer_from,
        dtype=options.dtype,
        trust_remote_code=options.trust_remote_code,
    )
    tokenizer = load_tokenizer(options.components[options.tokenizer_from])
    if options.calibration_texts:
        rows = rows_of(
            options.calibration_texts, tokenizer, options.row_length, options.calibration_rows, options.cache_folder
        )
        print(calibrate(model, rows, batch_size=options.batch_size, order=options.order))
    if any(row.transplanted for row in model.transplant_report.components):
        print(model.transplant_report)
    print(model.describe())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"The supernet is in {folder}")
