"""Gradient strategies: the planted answer, formulas, splits, accumulation, resumption after a kill."""

import json
import random
import signal

import pytest
import torch
from safetensors.torch import load_file
from search_runs import LENGTH, VARIANTS, VOCABULARY, arguments, finish, rows, supernet, trainer_of
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Mamba2Config, Mamba2ForCausalLM, TrainerCallback

from modeling_manticore import ManticoreForCausalLM, ManticoreTrainer
from modeling_manticore.search.dash import annealed
from modeling_manticore.search.gaea import FLOOR


class Watch(TrainerCallback):
    """Calls a function with the global step at one moment of every step."""

    def __init__(self, moment, function):
        def call(args, state, control, **kwargs) -> None:
            function(state.global_step)

        setattr(self, moment, call)


# --- the planted answer ---


def steps_of_a_cycle(count: int, seed: int, first: int | None = None) -> list[dict]:
    """Rows in which the next token is always the last plus 5; with `first` 0 or 1, of even or odd first tokens."""
    starts = torch.randint(0, VOCABULARY, (count, 1), generator=torch.Generator().manual_seed(seed))
    starts = starts if first is None else 2 * (starts // 2) + first
    return [{"input_ids": row, "labels": row} for row in (starts + 5 * torch.arange(LENGTH)) % VOCABULARY]


@pytest.fixture(scope="module")
def components():
    """A component that knows the cycle, and one of another family with large random weights."""
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2}
    good = GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, num_attention_heads=2, intermediate_size=32))
    optimizer = torch.optim.Adam(good.parameters(), lr=1e-2)
    ids = torch.stack([row["input_ids"] for row in steps_of_a_cycle(64, 0)])
    for _ in range(150):
        loss = good(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.5
    mamba = Mamba2Config(
        **sizes, num_heads=4, head_dim=8, state_size=4, n_groups=1, chunk_size=8, expand=2, initializer_range=0.5
    )
    return [good.eval(), Mamba2ForCausalLM(mamba).eval()]


@pytest.mark.parametrize("good", [0, 1])
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_mixture_moves_to_the_good_component(components, variant, good, tmp_path):
    mixture, own = VARIANTS[variant]
    model = ManticoreForCausalLM.from_components(components[:: 1 - 2 * good], num_blocks=2, mixture=mixture)
    own = own | {"mixture_learning_rate": 1.0 if "gaea" in variant else 0.1}
    args = arguments(tmp_path, **own, max_steps=40, train_components=False, learning_rate=1e-4)
    args.per_device_train_batch_size = 8
    search = {"search_dataset": steps_of_a_cycle(32, 2, first=1)} if "darts" in variant else {}
    trainer = ManticoreTrainer(model, args, train_dataset=steps_of_a_cycle(64, 1, first=0), **search)
    trainer.train()
    for point in model.mixture_weights():
        assert point[good] > 0.8, model.mixture_weights()
    assert all(p.requires_grad for p in model.parameters())
    points = [parameter for name, parameter in model.named_parameters() if "mixture" in name]
    assert points and all(p.dtype == torch.float32 for p in points)


# --- formulas ---


@pytest.mark.parametrize("base, clip", [("joint", 0.0), ("joint", 0.05), ("darts", 0.05), ("darts", 1.0)])
def test_gaea_is_the_closed_formula(base, clip, tmp_path, monkeypatch):
    from modeling_manticore.search import gaea

    variant = f"gaea_{base}"
    gradients, weights, rates = [], [], []
    trainer = trainer_of(variant, tmp_path, max_steps=6, max_grad_norm=clip, mixture_learning_rate=3.0)
    model = trainer.model
    weights.append([point.double().clone() for point in model.mixture_weights()])
    search_gradients = gaea.search_gradients

    def seen(*given):
        found, loss = search_gradients(*given)
        gradients.append([gradient.double().clone() for gradient in found])
        return found, loss

    monkeypatch.setattr(gaea, "search_gradients", seen)

    def read(step):  # runs after the strategy's own hook, which leaves the gradients
        rates.append(3.0 * (1 - step / 6))
        if base == "joint":
            gradients.append([block.mixture.parameter.grad.double().clone() for block in model.model.blocks])

    def after(step):
        weights.append([point.detach().double().clone() for point in model.mixture_weights()])

    trainer.add_callback(Watch("on_pre_optimizer_step", read))
    trainer.add_callback(Watch("on_step_end", after))
    trainer.train()
    assert len(gradients) == len(rates) == 6 and len(weights) == 7
    moved = 0.0
    for n in range(6):
        for before, gradient, found in zip(weights[n], gradients[n], weights[n + 1]):
            expected = before * torch.exp(-rates[n] * gradient)
            expected = expected / expected.sum()
            torch.testing.assert_close(found, expected, atol=2e-7, rtol=0)
            assert abs(found.sum().item() - 1) <= 2e-7 and (found > 0).all()
            moved = max(moved, (found - before).abs().max().item())
    assert moved > 1e-3


def test_gaea_stays_on_the_simplex_under_huge_gradients():
    from modeling_manticore.search.gaea import exponentiated_step

    point = torch.tensor([0.0, 0.25, 0.75])
    for gradient in ([1e5, -1e5, 0.0], [-1e5, 1e5, 1e5], [3e38, 0.0, -3e38]):
        exponentiated_step(point, torch.tensor(gradient), 10.0)
        assert (point >= 0.99 * FLOOR).all() and abs(point.double().sum().item() - 1) <= 2e-7
    for _ in range(3):
        exponentiated_step(point, torch.tensor([0.0, 0.0, 8.0]), 1.0)
    assert point[2] < 0.01, "a path at the floor does not come back"


def test_darts_is_adam_on_the_search_gradient(tmp_path, monkeypatch):
    from modeling_manticore.search import darts

    gradients = []
    search_gradients = darts.search_gradients

    def seen(*given):
        found, loss = search_gradients(*given)
        gradients.append([gradient.double().clone() for gradient in found])
        return found, loss

    monkeypatch.setattr(darts, "search_gradients", seen)
    trainer = trainer_of("darts", tmp_path, max_steps=5, weight_decay=0.1)
    trainer.train()
    for b, block in enumerate(trainer.model.model.blocks):
        value, first, second = (torch.zeros(2, dtype=torch.float64) for _ in range(3))
        for n in range(5):
            first = 0.9 * first + 0.1 * gradients[n][b]
            second = 0.999 * second + 0.001 * gradients[n][b] ** 2
            root = (second / (1 - 0.999 ** (n + 1))).sqrt() + 1e-8
            value = value - 0.05 * (1 - n / 5) * (first / (1 - 0.9 ** (n + 1))) / root
        torch.testing.assert_close(block.mixture.logits.detach().double(), value, atol=1e-6, rtol=0)


def test_the_temperature_of_dash(tmp_path):
    seen = []
    trainer = trainer_of("dash", tmp_path, max_steps=5, gradient_accumulation_steps=2)
    model = trainer.model
    model.set_mixture_weights([[0.3, 0.7], [0.9, 0.1]])
    before = [point.detach().clone() for point in model.mixture_weights()]
    start = []
    trainer.add_callback(
        Watch("on_train_begin", lambda step: start.extend(p.clone() for p in model.mixture_weights()))
    )
    trainer.add_callback(
        Watch("on_pre_optimizer_step", lambda step: seen.append([b.mixture.temperature for b in model.model.blocks]))
    )
    trainer.train()
    for found, expected in zip(start, before):
        torch.testing.assert_close(found.detach(), expected)
    expected = [2.0 * (0.2 / 2.0) ** (n / 4) for n in range(5)]
    assert seen == [pytest.approx([t, t]) for t in expected]
    assert [annealed(2.0, 0.2, n, 5) for n in range(5)] == pytest.approx(expected)
    assert annealed(2.0, 0.2, 0, 1) == 2.0
    logged = [entry["mixture/temperature"] for entry in trainer.state.log_history if "mixture/temperature" in entry]
    assert logged[:6] == pytest.approx([2.0, *expected])
    model.save_pretrained(tmp_path / "saved")
    again = ManticoreForCausalLM.from_pretrained(tmp_path / "saved")
    for found, expected in zip(again.mixture_weights(), model.mixture_weights()):
        torch.testing.assert_close(found, expected)
    assert not any(block.mixture._forward_hooks for block in model.model.blocks)


def test_the_noise_of_dash_is_gumbel(tmp_path):
    trainer = trainer_of("dash", tmp_path, max_steps=2)
    values = []
    for step in range(2000):
        trainer.state.global_step, trainer.state.max_steps = step, 2000
        trainer.strategy.before_step(trainer)
        values += list(trainer.strategy.noise.values())
    values = torch.stack(values).flatten().double()
    assert values.mean().item() == pytest.approx(0.5772, abs=0.06)
    assert values.var().item() == pytest.approx(torch.pi**2 / 6, abs=0.12)


def test_the_best_model_has_its_own_temperature(tmp_path):
    class Rising(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            metrics["eval_loss"] = float(state.global_step)

    points = {}
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": False}
    trainer = trainer_of("dash", tmp_path, [Rising()], max_steps=4, mixture_learning_rate=0.5, **options)
    model = trainer.model
    keep = Watch("on_step_end", lambda n: points.setdefault(n, [p.detach().clone() for p in model.mixture_weights()]))
    trainer.add_callback(keep)
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-1")
    for found, expected in zip(model.mixture_weights(), points[1]):
        torch.testing.assert_close(found.detach(), expected)
    assert model.config.mixture_temperature == 2.0


# --- splits ---


@pytest.mark.parametrize("variant", ["darts", "gaea_darts"])
def test_each_split_trains_its_own(variant, tmp_path):
    """Rows of the search split hold token 1 only, rows of the train split token 2 only."""
    mixture, own = VARIANTS[variant]
    split = {
        name: [{"input_ids": torch.full((LENGTH,), token)} for _ in range(8)] for token, name in ((1, "s"), (2, "t"))
    }
    for part in split.values():
        for row in part:
            row["labels"] = row["input_ids"]
    model = supernet(mixture)
    args = arguments(tmp_path, **own, max_steps=3, optim="sgd")
    trainer = ManticoreTrainer(model, args, train_dataset=split["t"], search_dataset=split["s"])
    passes, moments = [], []
    model.register_forward_pre_hook(
        lambda m, a, kw: passes.append((set(kw["input_ids"].unique().tolist()), mixture_flags(model))),
        with_kwargs=True,
    )
    before = {}

    def weights(step):
        grads = {name: p.grad for name, p in model.named_parameters()}
        moments.append(
            (
                all(g is None for name, g in grads.items() if "mixture" in name),
                any(g is not None for name, g in grads.items() if "mixture" not in name),
            )
        )

    def begin(step):
        before.update({n: p.detach().clone() for n, p in model.named_parameters()})

    def mixture_step_done(
        step,
    ):  # after the strategy's hook: the mixture has moved, no weight has, no gradient is left
        for name, parameter in model.named_parameters():
            assert torch.equal(parameter, before[name]) != ("mixture" in name), name
            assert parameter.grad is None, name

    def step_done(step):
        before.update({n: p.detach().clone() for n, p in model.named_parameters() if "mixture" not in n})
        for name, parameter in model.named_parameters():
            if "mixture" in name:
                assert not torch.equal(parameter, before[name]), "moved since the step began"
                before[name] = parameter.detach().clone()

    trainer.add_callback(Watch("on_train_begin", begin))
    trainer.add_callback(Watch("on_step_begin", mixture_step_done))
    trainer.add_callback(Watch("on_pre_optimizer_step", weights))
    trainer.add_callback(Watch("on_step_end", step_done))
    trainer.train()
    assert passes == [({1}, True), ({2}, False)] * 3
    assert moments == [(True, True)] * 3
    assert all("search_loss" in entry for entry in trainer.state.log_history if entry.get("loss"))


def mixture_flags(model) -> bool:
    return all(block.mixture.parameter.requires_grad for block in model.model.blocks)


def test_the_search_gradient_is_that_of_the_search_loss(tmp_path):
    from modeling_manticore.search.gradients import search_gradients

    trainer = trainer_of("darts", tmp_path, max_grad_norm=0.0, gradient_accumulation_steps=3)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # of the weight step, which may be an epoch's short last one
    with trainer.strategy.attached(trainer):
        trainer.strategy.begin(trainer)
        batches = trainer.strategy.batches.step()
        found, loss = search_gradients(trainer, trainer.strategy.parameters, batches)
    model = trainer.model.train()
    joined = {key: torch.cat([batch[key] for batch in batches]) for key in batches[0]}
    expected_loss = model(**joined).loss
    expected_loss.backward()
    assert trainer.current_gradient_accumulation_steps == 1
    torch.testing.assert_close(loss, expected_loss.detach(), atol=1e-5, rtol=1e-5)
    for gradient, block in zip(found, model.model.blocks):
        torch.testing.assert_close(gradient, block.mixture.parameter.grad, atol=1e-6, rtol=1e-4)


def test_the_search_split_is_an_endless_stream_of_permutations(tmp_path):
    trainer = trainer_of("darts", tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=2)
    data = trainer.search_dataset
    trainer.strategy.batches = batches = stream_of(trainer)
    state = torch.get_rng_state()
    drawn = [row for _ in range(7) for batch in batches.step() for row in batch["input_ids"]]
    assert torch.equal(state, torch.get_rng_state())
    names = {tuple(row["input_ids"].tolist()): i for i, row in enumerate(data)}
    order = [names[tuple(row.tolist())] for row in drawn]
    epochs = [order[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs) and len(set(map(tuple, epochs))) > 1
    again = stream_of(trainer)
    again.load_state_dict(batches.state_dict() | {"taken": 12})
    rest = [names[tuple(row.tolist())] for _ in range(4) for batch in again.step() for row in batch["input_ids"]]
    assert rest == order[12:]
    with pytest.raises(ValueError, match="search_dataset: got rows=7, but the checkpoint was written with rows=9"):
        again.load_state_dict({"taken": 0, "rows": 9, "seed": 42})


@pytest.mark.parametrize("variant", ["darts", "gaea_darts"])
def test_the_cost_term_is_in_the_search_loss_once(variant, tmp_path):
    def weights(size, parts, cost):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts, "cost_weight": cost}
        trainer = trainer_of(variant, tmp_path, max_steps=3, max_grad_norm=0.0, **options)
        trainer.train()
        return torch.stack(trainer.model.mixture_weights()).detach(), trainer.state.log_history[1]["search_loss"]

    (whole, loss), (parts, other), (free, without) = weights(8, 1, 5.0), weights(2, 4, 5.0), weights(2, 4, 0.0)
    torch.testing.assert_close(parts, whole, atol=2e-5, rtol=0)
    assert other == pytest.approx(loss, abs=1e-5) and other > without + 1
    assert (free - whole).abs().max() > 1e-3


def stream_of(trainer):
    from modeling_manticore.search.search_data import SearchBatches

    return SearchBatches(trainer)


# --- accumulation ---


@pytest.mark.parametrize("variant", VARIANTS)
def test_accumulated_gradients_equal_one_large_batch(variant, tmp_path):
    def weights(size, parts):
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        trainer = trainer_of(variant, tmp_path, max_steps=3, optim="sgd", learning_rate=1e-2, **options)
        trainer.train()
        return trainer.model.state_dict(), trainer.model.mixture_weights()

    (whole, points), (parts, others) = weights(8, 1), weights(2, 4)
    assert all((point - 0.5).abs().max() > 1e-4 for point in points)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, atol=2e-5, rtol=1e-3, msg=name)
    for found, expected in zip(others, points):
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


# --- resumption ---


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """The uninterrupted runs, made when they are asked for."""
    made = {}

    def reference(variant):
        if variant not in made:
            made[variant] = tmp_path_factory.mktemp(variant)
            assert finish(variant, made[variant]) == 0
        return made[variant]

    return reference


def logs(folder):
    """What was logged, but for the times."""
    history = json.loads((folder / "final" / "history.json").read_text())
    entries = [{k: v for k, v in entry.items() if "runtime" not in k and "_per_second" not in k} for entry in history]
    return [entry for entry in entries if "train_loss" not in entry]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_at_a_random_step(variant, seed, references, tmp_path):
    step = random.Random(f"{variant}{seed}").randrange(3, 10)
    assert finish(variant, tmp_path, kill_step=step) == -signal.SIGKILL
    last = sorted(tmp_path.glob("checkpoint-*"), key=lambda folder: int(folder.name[11:]))[-1]
    assert json.loads((last / "strategy_state.json").read_text())["strategy"] == VARIANTS[variant][1]["strategy"]
    assert finish(variant, tmp_path, resume=True) == 0
    got, expected = (load_file(folder / "final" / "model.safetensors") for folder in (tmp_path, references(variant)))
    assert got.keys() == expected.keys()
    assert max((got[name].double() - expected[name].double()).abs().max().item() for name in got) <= 1e-6
    for ours, theirs in zip(logs(tmp_path), logs(references(variant)), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize(
    "variant, changed, message",
    [
        ("gaea_joint", {"gaea_base": "darts"}, "gaea_base: got 'darts', but .* was written with 'joint'"),
        ("dash", {"temperature_end": 0.1}, "temperature_end: got 0.1, but .* was written with 0.2"),
    ],
)
def test_another_search_is_not_resumed(variant, changed, message, tmp_path):
    trainer_of(variant, tmp_path, max_steps=2, save_strategy="steps", save_steps=2).train()
    mixture, own = VARIANTS[variant]
    args = arguments(tmp_path, **(own | changed))
    search = {"search_dataset": rows(4, 5)} if args.gaea_base == "darts" else {}
    other = ManticoreTrainer(supernet(mixture), args, train_dataset=rows(8, 1), **search)
    with pytest.raises(ValueError, match=message):
        other.train(resume_from_checkpoint=True)
