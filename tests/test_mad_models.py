"""MAD's models and protocol: the decoder, the metric for evaluate, runs, results, the command."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_manticore.commands import main
from modeling_manticore.tasks.mad import SETTINGS, make_splits, setting_of, token_accuracy
from modeling_manticore.tasks.mad.decoder import CompressionDecoder, CompressionModel, sinusoids
from modeling_manticore.tasks.mad.models import ARCHITECTURES, configuration_of, model_of
from modeling_manticore.tasks.mad.protocol import PRESETS, preset_of, run_mad


SMALL = replace(
    PRESETS["cpu"],
    settings=(
        setting_of("in-context-recall", sequence_length=16, train_rows=24),
        setting_of("in-context-recall", sequence_length=8, train_rows=24),
        setting_of("compression", sequence_length=8, train_rows=24),
    ),
    batch_size=8,
    epochs=1,
    hidden_size=32,
    validation_rows=8,
    test_rows=8,
)


def test_decoder():
    decoder = CompressionDecoder(hidden_size=8, vocab_size=5, sequence_length=6)
    assert decoder(torch.randn(3, 8)).shape == (3, 6, 5)
    assert not decoder.state_dict().keys() & {"positions"}
    positions = sinusoids(50, 8)
    assert positions.shape == (50, 8) and len(positions.unique(dim=0)) == 50
    with pytest.raises(ValueError, match="hidden_size: got 7, allowed is a positive even integer"):
        CompressionDecoder(7, 5, 6)
    with pytest.raises(ValueError, match="sequence_length: got 0, allowed is a positive integer"):
        CompressionDecoder(8, 5, 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_models(architecture):
    recall = setting_of("in-context-recall", sequence_length=16)
    first, second = (model_of(architecture, recall, 32, 4, seed=1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    input_ids, labels = (torch.tensor(part[:4], dtype=torch.long) for part in make_splits(recall, 1, 1)["train"])
    first.eval()
    output = first(input_ids=input_ids, labels=labels)
    # Shifted by the model, averaged over the labels that there are.
    expected = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected)

    setting = setting_of("compression", sequence_length=16)
    model = model_of(architecture, setting, 32, 4, seed=1).eval()
    assert isinstance(model, CompressionModel)
    input_ids, labels = (torch.tensor(part[:4], dtype=torch.long) for part in make_splits(setting, 1, 1)["train"])
    output = model(input_ids=input_ids, labels=labels)
    assert output["logits"].shape == (4, 16, 16)
    expected = torch.nn.functional.cross_entropy(output["logits"].flatten(0, 1), labels.flatten())
    torch.testing.assert_close(output["loss"], expected)
    # Everything goes through the last token's state: an earlier token changes every logit.
    changed = input_ids.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 15
    assert ((model(input_ids=changed)["logits"] - output["logits"]).abs().amax(-1) > 0).all()


def test_bad_models():
    recall = setting_of("in-context-recall")
    for changes, message in (
        ({"architecture": "lstm"}, "architecture: got 'lstm', allowed are gpt_neox, mamba2, hybrid"),
        ({"hidden_size": 48}, "hidden_size: got 48, allowed are positive multiples of 32"),
        ({"layers": 6}, "layers: got 6 of 'hybrid', allowed are positive multiples of 4"),
    ):
        with pytest.raises(ValueError, match=message):
            configuration_of(**{"architecture": "hybrid", "setting": recall, "hidden_size": 64, "layers": 4} | changes)


def test_metric_of_evaluate(tmp_path):
    from modeling_manticore.tasks.mad.evaluate_metric import TokenAccuracy

    metric = TokenAccuracy(cache_dir=str(tmp_path))
    predictions, references = [[4, 9, 0, 9], [9, 2, 9, 9]], [[-100, 4, -100, 5], [-100, -100, 2, -100]]
    metric.add_batch(predictions=predictions[:1], references=references[:1])
    metric.add_batch(predictions=predictions[1:], references=references[1:])
    expected = token_accuracy(np.array(predictions), np.array(references))
    assert metric.compute() == expected
    assert metric.compute(predictions=references, references=references, shift=False)["accuracy"] == 1


def test_presets():
    paper = PRESETS["paper"].cost()
    assert paper["settings"] == 66 and paper["runs"] == 396
    expected = 6 * 200 * sum(s.train_rows * s.sequence_length for s in PRESETS["paper"].settings)
    assert paper["tokens"] == expected > 10**11
    assert {setting.task for setting in PRESETS["cpu"].settings} == set(SETTINGS)
    assert {setting.task for setting in preset_of("cpu", ["compression"], 3).settings} == {"compression"}
    assert preset_of("cpu", None, 3).epochs == 3
    for arguments, message in (
        (("gpu",), "preset: got 'gpu', allowed are cpu, paper"),
        (("cpu", ["copying"]), "tasks: got 'copying', allowed are in-context-recall"),
        (("cpu", []), "tasks: got nothing"),
        (("cpu", None, 0), "epochs: got 0, allowed is a positive integer"),
    ):
        with pytest.raises(ValueError, match=message):
            preset_of(*arguments)


def test_protocol(tmp_path, monkeypatch):
    output = tmp_path / "results" / "mad.json"
    result = run_mad(SMALL, "gpt_neox", output_file=output, progress=False)
    assert json.loads(output.read_text()) == result
    assert [entry.name for entry in output.parent.iterdir()] == ["mad.json"]
    assert set(result["scores"]) == {"in-context-recall", "compression"}
    tested = [entry["test_accuracy"] for entry in result["settings"]]
    assert result["scores"]["in-context-recall"] == pytest.approx((tested[0] + tested[1]) / 2)
    assert result["mean"] == pytest.approx((sum(tested[:2]) / 2 + tested[2]) / 2)
    for entry in result["settings"]:
        assert len(entry["runs"]) == 2
        best = max(entry["runs"], key=lambda run: (run["validation_accuracy"], -run["validation_loss"]))
        assert entry["chosen"]["learning_rate"] == best["learning_rate"]

    # An interrupted run is continued: what is finished is not trained again, the rest gives the same.
    cut = dict(result, settings=result["settings"][:2])
    output.write_text(json.dumps(cut))
    from modeling_manticore.tasks.mad import protocol

    trained = []
    monkeypatch.setattr(
        protocol, "model_of", lambda *arguments: trained.append(arguments[1].task) or model_of(*arguments)
    )
    again = run_mad(SMALL, "gpt_neox", output_file=output, progress=False)
    assert trained == ["compression"] * 2 and again["scores"] == result["scores"]

    with pytest.raises(ValueError, match="output_file: .* has results of other options"):
        run_mad(SMALL, "mamba2", output_file=output, progress=False)
    output.write_text("{}")
    with pytest.raises(ValueError, match="output_file: .* is no result of MAD"):
        run_mad(SMALL, "gpt_neox", output_file=output, progress=False)
    with pytest.raises(ValueError, match="output_file: got the folder"):
        run_mad(SMALL, "gpt_neox", output_file=tmp_path, progress=False)


def test_the_test_split_chooses_nothing(monkeypatch):
    """Of each setting, one model is measured on the test split, after all were measured on the validation split."""
    from modeling_manticore.tasks.mad import protocol

    measured = []

    class Watched(protocol.Trainer):
        def evaluate(self, dataset):
            measured.append(len(dataset))
            return super().evaluate(dataset)

    monkeypatch.setattr(protocol, "Trainer", Watched)
    run_mad(replace(SMALL, settings=SMALL.settings[1:2], test_rows=9), "gpt_neox", progress=False)
    assert measured == [8, 8, 9]


def test_command(tmp_path, capsys, monkeypatch):
    from modeling_manticore.tasks.mad import protocol

    output = tmp_path / "mad.json"
    assert main(["mad", "--preset", "paper", "--output_file", str(output)]) == 2
    printed = capsys.readouterr()
    assert "66 settings, 396 runs" in printed.out and "tokens" in printed.out
    assert "yes: not given, and the preset 'paper' is 396 runs" in printed.err and not output.exists()
    assert main(["mad", "--output_file", str(output), "--architecture", "lstm"]) == 2
    assert "architecture: got 'lstm'" in capsys.readouterr().err
    monkeypatch.setitem(protocol.PRESETS, "cpu", SMALL)
    recipe = tmp_path / "mad.yaml"
    recipe.write_text(f"output_file: {output}\ntasks: [in-context-recall]\narchitecture: hybrid\n")
    assert main(["mad", str(recipe)]) == 0
    printed = capsys.readouterr().out
    assert "in-context-recall" in printed and "mean" in printed and "hybrid" in printed
    assert len(json.loads(output.read_text())["settings"]) == 2


@pytest.mark.slow
def test_recall_is_learned():
    preset = replace(preset_of("cpu", ["in-context-recall"]), learning_rates=(3e-3,))
    assert run_mad(preset, "hybrid", progress=False)["mean"] > 0.9


def test_causal_convention():
    """A causal model trained on a handful of rows learns exactly their labels, through transformers' own shift."""
    setting = setting_of("memorization", vocab_size=15, sequence_length=8, train_rows=4)
    model = model_of("gpt_neox", setting, 32, 2, seed=0)
    assert isinstance(model, AutoModelForCausalLM._model_mapping[type(model.config)])
    input_ids, labels = (torch.tensor(part, dtype=torch.long) for part in make_splits(setting, 1, 1)["train"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        model(input_ids=input_ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert token_accuracy(model(input_ids=input_ids).logits.detach().numpy(), labels.numpy())["accuracy"] == 1
