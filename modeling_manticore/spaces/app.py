"""Try a hybrid in a browser: it goes on from a prompt, its components beside it if wanted."""

import html
import json
import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer


HERE = Path(__file__).resolve().parent
SETTINGS = json.loads((HERE / "space.json").read_text(encoding="utf-8"))
MODELS = [SETTINGS["hybrid"], *SETTINGS["components"]]  # each {"name", "source", "revision"}
PATIENCE = 300.0  # seconds for the next token


@lru_cache(maxsize=len(MODELS))
def load(index: int):
    """Model and tokenizer number `index`: 0 is the hybrid, whose code comes with it and is pinned to a commit."""
    source, revision = MODELS[index]["source"], MODELS[index]["revision"]
    place = str(HERE / source) if (HERE / source).is_dir() else source
    pinned = {} if revision is None else {"revision": revision}
    model = AutoModelForCausalLM.from_pretrained(place, trust_remote_code=index == 0, **pinned)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return model.to(device).eval(), AutoTokenizer.from_pretrained(place, **pinned)


def stream(index: int, prompt: str, max_new_tokens: int = 64, temperature: float = 0.0) -> Iterator[str]:
    """
    What model `index` writes after the prompt, longer with every token.

    Raises:
        ValueError: there is no prompt, or it leaves no room in the model's context.
    """
    if not prompt.strip():
        raise ValueError("Type a prompt first.")
    model, tokenizer = load(index)
    inputs = tokenizer(prompt, return_tensors="pt").to(model.device)
    inputs.pop("token_type_ids", None)
    context = getattr(model.config, "max_position_embeddings", None)
    room = max_new_tokens if not context else min(max_new_tokens, context - inputs["input_ids"].shape[1])
    if room < 1:
        raise ValueError(f"The prompt is too long: {MODELS[index]['name']} reads at most {context} tokens.")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True, timeout=PATIENCE)
    options = {"do_sample": temperature > 0, "max_new_tokens": int(room), "pad_token_id": tokenizer.pad_token_id}
    if temperature > 0:
        options["temperature"] = float(temperature)
    if options["pad_token_id"] is None:
        options["pad_token_id"] = tokenizer.eos_token_id
    failed = []

    def generate() -> None:
        try:
            model.generate(**inputs, **options, streamer=streamer)
        except Exception as error:
            failed.append(error)
            streamer.end()

    thread = threading.Thread(target=generate, daemon=True)
    thread.start()
    text = ""
    for piece in streamer:
        text += piece
        yield text
    thread.join()
    if failed:
        raise failed[0]


def answers(prompt: str, compare: bool, max_new_tokens: int = 64, temperature: float = 0.0) -> Iterator[list[str]]:
    """One text a model, the hybrid's first; components stay empty unless `compare`."""
    texts = [""] * len(MODELS)
    for index in range(len(MODELS) if compare else 1):
        for text in stream(index, prompt, max_new_tokens, temperature):
            texts[index] = text
            yield list(texts)
    yield list(texts)


def build():
    """The page."""
    import gradio

    def run(*inputs):
        try:
            for texts in answers(*inputs):
                yield texts if len(texts) > 1 else texts[0]
        except ValueError as error:
            raise gradio.Error(html.escape(str(error))) from error

    picture = (HERE / "hybrid.svg").read_text(encoding="utf-8") if (HERE / "hybrid.svg").is_file() else ""
    dark = "<style>.dark #picture svg { filter: invert(1) hue-rotate(180deg); }</style>"
    with gradio.Blocks(title=SETTINGS["title"]) as page:
        gradio.HTML(f"<h1>{html.escape(SETTINGS['title'])}</h1><p>{html.escape(SETTINGS['text'])}</p>")
        if picture:
            drawn = f'{dark}<div style="overflow-x: auto">{picture[picture.index("<svg") :]}</div>'
            gradio.HTML(drawn, elem_id="picture")
        prompt = gradio.Textbox(label="Prompt", lines=3, placeholder="In the beginning", elem_id="prompt")
        with gradio.Row():
            tokens = gradio.Slider(8, 512, value=64, step=8, label="New tokens at most")
            temperature = gradio.Slider(0, 1.5, value=0, step=0.1, label="Temperature (0: the likeliest token)")
        compare = gradio.Checkbox(
            label="Ask the components too", elem_id="compare", visible=bool(SETTINGS["components"])
        )
        button = gradio.Button("Write on", variant="primary", elem_id="write")
        with gradio.Row():
            boxes = [
                gradio.Textbox(
                    label=entry["name"], lines=6, interactive=False, visible=index == 0, elem_id=f"answer{index}"
                )
                for index, entry in enumerate(MODELS)
            ]
        if boxes[1:]:
            compare.change(lambda wanted: [gradio.update(visible=wanted) for _ in boxes[1:]], compare, boxes[1:])
        for event in (button.click, prompt.submit):
            event(run, [prompt, compare, tokens, temperature], boxes)
    return page


if __name__ == "__main__":
    build().queue().launch()
