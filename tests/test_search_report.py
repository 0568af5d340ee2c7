"""The report of a gradient search: folder, numbers, progress bar, plain logs; rows that two splits share."""

import json
import logging

import pytest
import torch
from search_runs import LENGTH, VARIANTS, arguments, rows, supernet, trainer_of
from transformers import ProgressCallback, TrainerCallback

from modeling_manticore import Budget, ManticoreConfig, ManticoreForCausalLM, ManticoreTrainer, cost_table
from modeling_manticore.search import STRATEGIES, pictures, suit_mixture
from modeling_manticore.search.history import by_component, points_in
from modeling_manticore.search.pictures import draw_heat_map


FILES = ["hybrid.png", "mixture_heatmap.png", "mixture_weights.png", "report.html", "search.json"]


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_folder(variant, tmp_path):
    options = {"max_steps": 4, "eval_strategy": "steps", "eval_steps": 2, "mixture_learning_rate": 0.3}
    trainer = trainer_of(variant, tmp_path, **options)
    trainer.train()
    model = trainer.model
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == FILES
    assert all((tmp_path / "report" / name).read_bytes().startswith(b"\x89PNG") for name in FILES[:3])
    saved = json.loads((tmp_path / "report" / "search.json").read_text())
    assert saved == json.loads(json.dumps(trainer.search_report.to_dict())) and saved["schema"] == 1
    assert saved["strategy"] == VARIANTS[variant][1]["strategy"] and saved["steps"] == 4
    assert saved["arguments"]["mixture_learning_rate"] == 0.3
    assert saved["arguments"]["mixture"] == model.config.mixture and saved["arguments"]["seed"] == 42
    assert saved["effort"]["tokens"] == 4 * 2 * LENGTH and saved["effort"]["seconds"] > 0
    assert saved["effort"]["search_tokens"] == (4 * 2 * LENGTH if "darts" in variant else 0)
    table, probability = cost_table(model), 1.0
    for block, point in zip(saved["blocks"], model.mixture_weights(), strict=True):
        assert block["weights"] == pytest.approx(point.tolist())
        assert block["entropy"] == pytest.approx(torch.special.entr(point).sum().item())
        probability *= point.max().item()
    assert saved["blocks"][1]["paths"] == ["gpt_neox[1:2]", "mamba2[1:2]"]
    assert saved["choice"] == [int(point.argmax()) for point in model.mixture_weights()]
    assert saved["probability"] == pytest.approx(probability)
    assert saved["costs"]["choice"] == table.of(saved["choice"]) and saved["choice_within_limits"] is None
    expected = table.terms["parameters"].expected([p.detach() for p in model.mixture_weights()])
    assert saved["costs"]["expected"]["parameters"] == pytest.approx(float(expected), rel=1e-5)
    losses = {entry["step"]: entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry}
    best = saved["best_evaluation"]["eval_loss"]
    assert losses.keys() == {2, 4} and best["value"] == min(losses.values()) == losses[best["step"]]
    assert f"{saved['choice'][0]},{saved['choice'][1]}" in str(trainer.search_report)


def test_the_choice_within_limits(tmp_path):
    args = arguments(tmp_path, strategy="joint", max_steps=1, mixture_learning_rate=0.0)
    model = supernet("softmax")
    model.set_mixture_weights([[0.9, 0.1], [0.7, 0.3]])
    trainer = ManticoreTrainer(model, args, None, rows(8, 1), budget=Budget(max_attention_blocks=1))
    trainer.train()
    report = trainer.search_report
    assert report.choice == [0, 0] and report.choice_within_limits == [0, 1]
    assert report.costs["choice"]["attention_blocks"] == 2
    assert report.costs["choice_within_limits"]["attention_blocks"] == 1 and report.limits == {"attention_blocks": 1}
    assert "within the limits (attention_blocks <= 1): 0,1" in str(report)


def test_skip_paths_are_told_and_never_chosen_at_the_ends(tmp_path):
    config = supernet("softmax").config
    blocks = [[*block, {"component": None}] for block in config.blocks]
    blocks.insert(1, [{"component": 0, "start": 0, "stop": 1}, {"component": None}])
    model = ManticoreForCausalLM(ManticoreConfig(components=config.components, blocks=blocks))
    model.set_mixture_weights([[0.1, 0.2, 0.7], [0.2, 0.8], [0.3, 0.1, 0.6]])
    args = arguments(tmp_path, max_steps=1, mixture_learning_rate=0.0)
    trainer = ManticoreTrainer(model, args, None, rows(8, 1))
    trainer.train()
    assert trainer.search_report.choice == [1, 1, 0]
    assert trainer.search_report.blocks[1]["components"] == ["gpt_neox", "skip"]


def test_bad_budgets(tmp_path):
    data = rows(8, 1)
    with pytest.raises(ValueError, match="budget: got int, allowed is a Budget"):
        ManticoreTrainer(supernet("softmax"), arguments(tmp_path / "a"), None, data, budget=3)
    with pytest.raises(ValueError, match="budget: got Budget.* with stage='finetune'"):
        args = arguments(tmp_path / "a", stage="finetune")
        ManticoreTrainer(supernet("softmax"), args, None, data, budget=Budget(max_attention_blocks=1))
    with pytest.raises(ValueError, match="max_parameters: got 5, the smallest feasible value is"):
        args = arguments(tmp_path / "a")
        ManticoreTrainer(supernet("softmax"), args, None, data, budget=Budget(max_parameters=5))
    assert not any(tmp_path.iterdir())


def test_effort_goes_on_when_a_run_is_resumed(tmp_path):
    trainer_of("darts", tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    again = trainer_of("darts", tmp_path, max_steps=3, save_strategy="steps", save_steps=2)
    again.train(resume_from_checkpoint=True)
    effort = again.search_report.effort
    assert effort["tokens"] == effort["search_tokens"] == 3 * 2 * LENGTH
    first = json.loads((tmp_path / "checkpoint-2" / "strategy_state.json").read_text())["effort"]
    assert first["tokens"] == 2 * 2 * LENGTH and effort["seconds"] > first["seconds"] > 0


def test_without_matplotlib_there_is_json_and_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(pictures.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    trainer = trainer_of("darts", tmp_path, max_steps=1)
    with caplog.at_level("WARNING"):
        trainer.train()
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["report.html", "search.json"]
    assert (
        "matplotlib is not installed: mixture_heatmap.png, mixture_weights.png and hybrid.png will not be drawn"
        in caplog.text
    )


def test_heat_maps(tmp_path):
    names, values = by_component([[0.2, 0.3, 0.5], [1.0]], [["a", "b", "a"], ["b"]])
    assert names == ["a", "b"] and values[0][0] == pytest.approx(0.7) and values[1] == [0.3, 1.0]
    assert values[0][1] != values[0][1]
    draw_heat_map(values, tmp_path / "new" / "map.png", names, "title", "unit", [0, 1], share=True)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["map.png"]


# --- what is shown and logged ---


@pytest.mark.parametrize("limit, choice", [(None, "1,0"), (0, "1,1")])
def test_the_progress_bar_shows_the_best_choice(limit, choice, tmp_path, monkeypatch):
    words = []

    class Bar:
        def __init__(self, *given, **named):
            pass

        def set_postfix_str(self, text, refresh=True):
            words.append(text)

        def update(self, count=1):
            pass

        write = close = update

    monkeypatch.setattr("transformers.trainer_callback.tqdm", Bar)
    model = supernet("softmax")
    model.set_mixture_weights([[0.2, 0.8], [0.75, 0.25]])
    args = arguments(tmp_path, max_steps=2, mixture_learning_rate=0.0, disable_tqdm=False)
    budget = None if limit is None else Budget(max_attention_blocks=limit)
    trainer = ManticoreTrainer(model, args, None, rows(8, 1), budget=budget)
    assert any(isinstance(callback, ProgressCallback) for callback in trainer.callback_handler.callbacks)
    trainer.train()
    p = 0.8 * (0.75 if limit is None else 0.25)
    assert len(words) == 4 and set(words) == {f"best {choice} (p {p:.2g})"}


def test_a_real_bar_without_a_terminal(tmp_path, capfd):
    trainer_of("dash", tmp_path, max_steps=2, disable_tqdm=False).train()
    assert "best " in capfd.readouterr().err


def test_logged_values_are_plain_numbers(tmp_path):
    class Keep(TrainerCallback):
        seen = {}

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.seen |= logs

    trainer_of("darts", tmp_path, [Keep()], max_steps=1).train()
    own = {key: value for key, value in Keep.seen.items() if key.startswith(("mixture/", "search_loss"))}
    assert len(own) == 7 and {type(value) for value in own.values()} == {float}
    points = points_in(own, [2, 2])
    assert [len(point) for point in points] == [2, 2] and points_in({"loss": 1.0}, [2, 2]) is None


# --- rates, parametrisations, temperatures ---


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_rate_of_mixture_weights(strategy, tmp_path):
    args = arguments(tmp_path, strategy=strategy, mixture_learning_rate=None)
    assert args.mixture_learning_rate == args.to_dict()["mixture_learning_rate"] == 0.1
    assert arguments(tmp_path, strategy=strategy, mixture_learning_rate=0.0).mixture_learning_rate == 0.0


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", ["softmax", "gumbel_softmax", "simplex"])
def test_a_mixture_is_made_to_suit_a_strategy(strategy, kind):
    model = supernet(kind, mixture_temperature=0.5)
    model.set_mixture_weights([[0.25, 0.75], [0.5, 0.5]])
    fits = kind in STRATEGIES[strategy].kinds
    assert suit_mixture(model, strategy) != fits
    assert model.config.mixture == (kind if fits else STRATEGIES[strategy].kinds[0])
    assert model.config.mixture_temperature == (0.5 if fits else 1.0)
    assert {block.mixture.temperature for block in model.model.blocks} == {model.config.mixture_temperature}
    torch.testing.assert_close(model.mixture_weights()[0], torch.tensor([0.25, 0.75]))


def test_the_last_temperature_of_dash_stays_until_the_next_search(tmp_path):
    trainer = trainer_of("dash", tmp_path, max_steps=3, mixture_learning_rate=0.5)
    trainer.train()
    expected = [point.detach() for point in trainer.model.mixture_weights()]
    trainer.save_model(str(tmp_path / "saved"))
    again = ManticoreForCausalLM.from_pretrained(tmp_path / "saved")
    assert again.config.mixture_temperature == again.model.blocks[0].mixture.temperature == pytest.approx(0.2)
    args = arguments(tmp_path / "b", **VARIANTS["dash"][1], max_steps=1, mixture_learning_rate=0.0, learning_rate=0.0)
    ManticoreTrainer(again, args, None, rows(8, 1)).train()
    assert again.config.mixture_temperature == again.model.blocks[0].mixture.temperature == 2.0
    for found, point in zip(again.mixture_weights(), expected):
        torch.testing.assert_close(found.detach(), point, atol=1e-6, rtol=0)


# --- splits by content ---


def train(search, training, evaluation, folder):
    args = arguments(folder, strategy="darts")
    return ManticoreTrainer(supernet("softmax"), args, None, training, evaluation, search_dataset=search)


@pytest.mark.parametrize("place", ["train_dataset", r"eval_dataset", r"eval_dataset\['other'\]"])
def test_most_rows_in_another_split_are_refused(place, tmp_path):
    search, other = rows(6, 5), rows(8, 1)
    guilty = [dict(row) for row in search[:4]] + rows(2, 9)
    training = guilty if place == "train_dataset" else rows(8, 2)
    evaluation = guilty if place == "eval_dataset" else {"other": guilty} if "other" in place else other
    with pytest.raises(ValueError, match=f"search_dataset: 4 of its 6 rows are also in {place}, allowed are"):
        train(search, training, evaluation, tmp_path / "run")
    assert not any(tmp_path.iterdir())


def test_a_few_shared_rows_are_told(tmp_path, caplog, monkeypatch):
    from datasets import Dataset

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    search = rows(6, 5)
    ids = [row["input_ids"].tolist() for row in search[:3] + rows(5, 7)]
    with caplog.at_level("WARNING"):
        train(search, Dataset.from_dict({"input_ids": ids, "labels": ids}), rows(4, 2), tmp_path)
    assert "search_dataset: 3 of its 6 rows are also in train_dataset." in caplog.text
    caplog.clear()
    with caplog.at_level("WARNING"):
        train(search, rows(8, 1), rows(4, 2), tmp_path)
    assert "are also in" not in caplog.text


def test_only_so_many_rows_are_compared(tmp_path, caplog, monkeypatch):
    from modeling_manticore.search import search_data

    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    monkeypatch.setattr(search_data, "COMPARED_ROWS", 4)
    search = rows(6, 5)
    with caplog.at_level("WARNING"):
        train(search, rows(3, 1) + search[:1] + search[1:], rows(4, 2), tmp_path)
    assert "1 of its first 4 rows are also in train_dataset" in caplog.text
