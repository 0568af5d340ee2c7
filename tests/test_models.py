"""What users of transformers expect: losses, partial logits, embeddings, checkpointing, dtypes, resizing."""

import copy
import pickle

import pytest
import torch
from tiny import FAMILIES, VOCAB, component, tokens
from torch.nn import functional
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from modeling_manticore import (
    ManticoreConfig,
    ManticoreForCausalLM,
    ManticoreForSequenceClassification,
    ManticoreForTokenClassification,
    discretize,
)


PAIRS = [("gpt_neox", "mamba"), ("gpt2", "mamba2"), ("gemma3_text", "falcon_mamba")]


def supernet(*families, **options):
    options = {"num_blocks": 2} | options
    return ManticoreForCausalLM.from_components([component(f, i) for i, f in enumerate(families)], **options)


@pytest.fixture(scope="module", params=PAIRS, ids="+".join)
def model(request):
    return supernet(*request.param)


@torch.no_grad()
def test_labels_are_shifted_and_ignored_at_minus_100(model):
    ids = tokens()
    labels = ids.clone()
    labels[0, :5] = -100
    out = model(ids, labels=labels)
    expected = functional.cross_entropy(out.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
    torch.testing.assert_close(out.loss, expected)
    count = (labels[:, 1:] != -100).sum()
    scaled = model(ids, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    torch.testing.assert_close(scaled, expected * count / 100)


@pytest.mark.parametrize("keep", [1, 3, torch.tensor([2, 7])], ids=["one", "three", "given"])
@torch.no_grad()
def test_logits_to_keep(model, keep):
    full = model(tokens()).logits
    wanted = full[:, -keep:] if isinstance(keep, int) else full[:, keep]
    torch.testing.assert_close(model(tokens(), logits_to_keep=keep).logits, wanted, atol=1e-5, rtol=0)


@torch.no_grad()
def test_hidden_states_are_the_boundaries_of_the_stream(model):
    out = model(tokens(), output_hidden_states=True)
    assert len(out.hidden_states) == model.config.num_hidden_layers + 1
    assert {tuple(h.shape) for h in out.hidden_states} == {(2, 12, model.config.hidden_size)}
    trunk = model.model(tokens(), output_hidden_states=True)
    assert all(torch.equal(a, b) for a, b in zip(out.hidden_states, trunk.hidden_states))
    assert torch.equal(trunk.last_hidden_state, trunk.hidden_states[-1])
    assert torch.equal(out.logits, model(tokens()).logits)


@pytest.mark.parametrize("families", [("gpt2", "mamba2"), ("gemma3_text", "mamba"), ("mamba", "gpt_neox")])
@torch.no_grad()
def test_input_embeddings(families):
    parts = supernet(*families)
    with pytest.raises(ValueError, match="2 stems"):
        parts(inputs_embeds=torch.zeros(2, 3, parts.config.hidden_size))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        parts()
    hybrid = discretize(parts, [0, 1])
    embeds = hybrid.get_input_embeddings()(tokens())
    torch.testing.assert_close(hybrid(inputs_embeds=embeds).logits, hybrid(tokens()).logits, atol=1e-6, rtol=0)
    assert parts.get_input_embeddings() is parts.model.stems["0"].get_input_embeddings()
    assert parts.get_output_embeddings() is parts.heads["0"].get_output_embeddings()


def test_gradient_checkpointing_gives_the_same_gradients(model):
    def gradients(checkpointed):
        twin = copy.deepcopy(model).train()
        if checkpointed:
            twin.gradient_checkpointing_enable()
            assert twin.is_gradient_checkpointing
        torch.manual_seed(0)
        twin(tokens(), labels=tokens()).loss.backward()
        return {name: p.grad for name, p in twin.named_parameters() if p.grad is not None}

    plain, saved = gradients(False), gradients(True)
    assert plain.keys() == saved.keys() == dict(model.named_parameters()).keys()
    for name, gradient in plain.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(saved[name], gradient, atol=float(1e-5 * scale + 1e-7), rtol=0, msg=name)


@torch.no_grad()
def test_resized_vocabulary_keeps_old_logits(model, tmp_path):
    twin = copy.deepcopy(model)
    before = twin(tokens()).logits
    twin.resize_token_embeddings(VOCAB + 3)
    assert twin.config.vocab_size == VOCAB + 3
    after = twin(tokens()).logits
    assert after.shape[-1] == VOCAB + 3
    torch.testing.assert_close(after[..., :VOCAB], before, atol=1e-5, rtol=0)
    assert torch.isfinite(twin(torch.full((1, 3), VOCAB + 2)).logits).all()
    twin.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["mismatched_keys"] and not info["unexpected_keys"]
    assert torch.equal(loaded(tokens()).logits, after)
    for k in twin.config.tied_components:
        head, stem = loaded.heads[str(k)].get_output_embeddings(), loaded.model.stems[str(k)].get_input_embeddings()
        assert head.weight is stem.weight


@pytest.mark.parametrize("cast", [lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16().float()])
@pytest.mark.parametrize("gate", ["routed", "learned"])
@torch.no_grad()
def test_mixture_weights_and_gates_stay_float32(cast, gate):
    model = supernet("gpt_neox", "mamba2", gate=gate)
    point = [torch.tensor([0.123456789, 0.876543211]), torch.tensor([1e-6, 1 - 1e-6])]
    model.set_mixture_weights(point)
    before = {n: p.clone() for n, p in model.named_parameters() if "mixture" in n or n.endswith(".gate")}
    cast(model)
    after = dict(model.named_parameters())
    assert all(after[n].dtype == torch.float32 and torch.equal(after[n], p) for n, p in before.items())
    assert torch.isfinite(model(tokens()).logits).all()


@torch.no_grad()
def test_a_16_bit_model_is_near_the_32_bit_one(model, tmp_path):
    model.save_pretrained(tmp_path)
    small = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert small.dtype == torch.bfloat16
    assert all(p.dtype == torch.float32 for n, p in small.named_parameters() if "mixture" in n)
    exact, rounded = model(tokens()).logits, small(tokens()).logits.float()
    assert (exact - rounded).norm() < 0.1 * exact.norm()


@pytest.mark.parametrize("mixture", ["softmax", "gumbel_softmax", "simplex"])
def test_mixtures(mixture):
    model = supernet("gpt_neox", "mamba2", mixture=mixture, mixture_temperature=0.5)
    for point in model.mixture_weights():
        assert not point.requires_grad and "grad_fn" not in repr(point)
        torch.testing.assert_close(point, torch.tensor([0.5, 0.5]))
    wanted = [torch.tensor([0.25, 0.75]), torch.tensor([1.0, 0.0])]
    model.set_mixture_weights(wanted)
    for point, goal in zip(model.mixture_weights(), wanted):
        torch.testing.assert_close(point, goal, atol=1e-6, rtol=0)
    assert all(torch.isfinite(block.mixture.parameter).all() for block in model.model.blocks)
    with torch.no_grad():
        assert torch.equal(model(tokens()).logits, model(tokens()).logits)
        model.train()
        noisy = [model(tokens()).logits for _ in range(2)]
    assert torch.equal(*noisy) == (mixture != "gumbel_softmax")
    model.set_mixture_weights([[0.5, 0.5], [0.5, 0.5]])
    model(tokens(), labels=tokens()).loss.backward()
    assert all(block.mixture.parameter.grad.abs().sum() > 0 for block in model.model.blocks)


@pytest.mark.parametrize("gate", ["routed", "mixture", "none", "learned"])
@torch.no_grad()
def test_paths_of_weight_zero_are_skipped_in_evaluation_only(gate):
    model = supernet("gpt_neox", "mamba2", mixture="simplex", gate=gate)
    model.set_mixture_weights([[1, 0], [1, 0]])
    ran = []
    for b, block in enumerate(model.model.blocks):
        for p, path in enumerate(block.paths):
            path.slice.register_forward_pre_hook(lambda *_, key=(b, p): ran.append(key))
    evaluated = model(tokens()).logits
    assert ran == [(0, 0), (1, 0)]
    ran.clear()
    trained = model.train()(tokens()).logits
    assert ran == [(0, 0), (0, 1), (1, 0), (1, 1)]
    torch.testing.assert_close(evaluated, trained, atol=1e-5, rtol=0)


def test_description():
    model = supernet("gpt_neox", "mamba2")
    text = model.describe()
    count = sum(p.numel() for p in model.parameters())
    for part in ("supernet of gpt_neox, mamba2", "gpt_neox[0:2] | mamba2[0:1]", f"parameters {count:,}", "context 64"):
        assert part in text
    # Two of four attention layers, keys and values of 32 numbers in 4 bytes each.
    hybrid = discretize(model, [0, 1])
    assert "discretized hybrid" in hybrid.describe() and "bridge 32 -> 16" in hybrid.describe()
    assert f"cache {2 * 2 * 32 * 4:,} bytes per token" in hybrid.describe()
    assert "context unlimited" in discretize(model, [1, 1]).describe()


@pytest.mark.parametrize("families", [("gpt_neox", "mamba2"), ("gpt2", "falcon_mamba"), ("qwen3", "mamba", "opt")])
def test_a_hybrid_from_scratch_learns(families):
    torch.manual_seed(0)
    configs = [FAMILIES[family]() for family in families]
    for config in configs:
        for name in ("initializer_range", "init_std"):
            if hasattr(config, name):
                setattr(config, name, 0.02)
    model = ManticoreForCausalLM(ManticoreConfig.from_partition(configs, 2)).train()
    assert not any(p.is_meta for p in model.parameters())
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(25):
        loss = model(tokens(), labels=tokens()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert abs(losses[0] - torch.log(torch.tensor(float(VOCAB)))) < 0.5  # starts as a guess among VOCAB tokens
    assert losses[-1] < losses[0] / 2


@torch.no_grad()
def test_classifiers(tmp_path):
    config = supernet("gpt_neox", "mamba2").config
    config.num_labels, config.pad_token_id = 3, 0
    ids = tokens() % (VOCAB - 1) + 1
    ids[1, 8:] = 0
    sequence = ManticoreForSequenceClassification(config).eval()
    out = sequence(ids, labels=torch.tensor([0, 2]))
    assert out.logits.shape == (2, 3) and torch.isfinite(out.loss)
    torch.testing.assert_close(out.logits[1], sequence(ids[1:, :8]).logits[0], atol=1e-5, rtol=0)
    token = ManticoreForTokenClassification(config).eval()
    out = token(ids, labels=ids % 3)
    assert out.logits.shape == (2, 12, 3) and torch.isfinite(out.loss)


@torch.no_grad()
def test_hidden_states_by_index(model):
    every = model(tokens(), output_hidden_states=True).hidden_states
    some = model(tokens(), output_hidden_states=[0, -1]).hidden_states
    assert [state is None for state in some] == [False, True, False]
    assert torch.equal(some[0], every[0]) and torch.equal(some[2], every[2])
    with pytest.raises(ValueError, match=r"output_hidden_states: got \[3\], allowed are indices from -3 to 2"):
        model(tokens(), output_hidden_states=3)


@torch.no_grad()
def test_a_bfloat16_classifier_behind_a_float32_residual():
    blocks = [[{"component": 0, "start": 0, "stop": 2}], [{"component": 1, "start": 1, "stop": 3}]]
    config = ManticoreConfig(components=[FAMILIES["gpt_neox"](), FAMILIES["mamba"]()], blocks=blocks, pad_token_id=0)
    for classifier in (ManticoreForSequenceClassification, ManticoreForTokenClassification):
        out = classifier(config).bfloat16().eval()(tokens(), output_hidden_states=True)
        assert {out.logits.dtype, *(state.dtype for state in out.hidden_states)} == {torch.bfloat16}


def attention(config):
    return [component._attn_implementation for component in config.components]


@torch.no_grad()
def test_attention_is_chosen_for_the_components_that_have_it():
    model = supernet("gpt_neox", "mamba2")
    assert attention(model.config) == ["sdpa", "eager"]
    expected = model(tokens()).logits
    model.set_attn_implementation("eager")
    assert attention(model.config) == ["eager", "eager"]
    torch.testing.assert_close(model(tokens()).logits, expected, atol=1e-4, rtol=0)
    model.set_attn_implementation({"": "sdpa"})
    assert attention(model.config) == ["sdpa", "eager"]
    with pytest.raises(ValueError, match="foo"):
        model.set_attn_implementation("foo")
    assert attention(model.config) == ["sdpa", "eager"]

    for asked in ("eager", "flex_attention", "sdpa"):
        config = copy.deepcopy(model.config)
        config._attn_implementation = asked
        assert attention(ManticoreForCausalLM(config).config) == [asked, "eager"]


def test_experts_are_computed_as_asked(tmp_path):
    model = supernet("gpt_neox", "jamba")
    model.set_experts_implementation("eager")
    assert model.config.components[1]._experts_implementation == "eager"
    model.save_pretrained(tmp_path)
    loaded = ManticoreForCausalLM.from_pretrained(tmp_path, experts_implementation="batched_mm")
    assert loaded.config.components[1]._experts_implementation == "batched_mm"


def test_every_stem_of_a_trunk_is_resized():
    trunk = supernet("gpt2", "mamba2").model
    trunk.stems["1"].get_input_embeddings().requires_grad_(False)
    trunk.resize_token_embeddings(VOCAB + 3)
    embeddings = [stem.get_input_embeddings().weight for stem in trunk.stems.values()]
    assert [(len(weight), weight.requires_grad) for weight in embeddings] == [(VOCAB + 3, True), (VOCAB + 3, False)]
    assert trunk.vocab_size == VOCAB + 3
    assert torch.isfinite(trunk(torch.tensor([[VOCAB + 2]])).last_hidden_state).all()


@torch.no_grad()
def test_a_classifier_on_a_language_model_keeps_its_trunk(model, tmp_path):
    model.save_pretrained(tmp_path)
    classifier, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, num_labels=3, output_loading_info=True
    )
    assert set(info["missing_keys"]) == {"score.weight"}
    trunk = AutoModel.from_pretrained(tmp_path)
    expected = model.model(tokens()).last_hidden_state
    assert torch.equal(trunk(tokens()).last_hidden_state, expected)
    assert torch.equal(classifier.model(tokens()).last_hidden_state, expected)


@torch.no_grad()
def test_copies_and_pickles_are_equal(model):
    expected = model(tokens()).logits
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(tokens()).logits, expected)
