"""`manticore evaluate MODEL`: loss, perplexity and next-token accuracy of a model on texts."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from .parsing import TEXT_CACHE, parse_options, positional_first, require, require_positive


@dataclass
class EvaluateOptions:
    model: str = field(metadata={"help": "Folder or repository of any causal language model."})
    texts: list[str] = field(
        metadata={"help": "bible, python, topics, or .txt/.jsonl files and folders; one line is printed for each."}
    )
    tokenizer: str | None = field(
        default=None, metadata={"help": "Folder or repository of the tokenizer (default: the model's)."}
    )
    rows: int | None = field(default=256, metadata={"help": "Rows of each text, spread over it."})
    row_length: int = field(default=128, metadata={"help": "Tokens per row."})
    batch_size: int = field(default=16, metadata={"help": "Rows per batch."})
    output_file: str | None = field(default=None, metadata={"help": "Also write the numbers there, as JSON."})
    json: bool = field(default=False, metadata={"help": "Print JSON instead of text."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Allow a model with code of its own."})
    cache_folder: str | None = field(default=None, metadata={"help": TEXT_CACHE})


KINDS = (EvaluateOptions,)


def run(arguments: list[str]) -> None:
    """
    Raises:
        ValueError: bad options, model or texts.
    """
    (options,) = parse_options(KINDS, positional_first(arguments, "model"), "evaluate")
    require_positive(options, "rows", "row_length", "batch_size")
    require(options.row_length >= 2, f"row_length: got {options.row_length}, allowed is at least 2.")
    output = None if options.output_file is None else Path(options.output_file)
    require(output is None or not output.is_dir(), f"output_file: got the folder {output}, allowed is a file.")

    from ..search.stitch_report import write_json
    from .models import load_model, load_tokenizer, measure, rows_of

    tokenizer = load_tokenizer(options.tokenizer or options.model, field="tokenizer" if options.tokenizer else "model")
    texts = {
        name: rows_of([name], tokenizer, options.row_length, options.rows, options.cache_folder)
        for name in options.texts
    }
    model = load_model(options.model, options.trust_remote_code)
    results = {name: measure(model, rows, options.batch_size, label=name) for name, rows in texts.items()}
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_json(output, {"model": options.model, "texts": results})
    if options.json:
        print(json.dumps({"model": options.model, "texts": results}, indent=2))
        return
    width = max(map(len, results))
    print(f"{'text':<{width}}  {'loss':>7}  {'perplexity':>10}  {'accuracy':>8}  {'tokens':>8}")
    for name, result in results.items():
        print(
            f"{name:<{width}}  {result['loss']:7.3f}  {result['perplexity']:10.2f}  {result['accuracy']:8.3f}  "
            f"{result['tokens']:8d}"
        )
