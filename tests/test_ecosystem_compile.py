"""torch.compile and torch.export: no graph break, equal logits, and decoding that stops compiling."""

import pytest
import torch
import torch._dynamo as dynamo
from test_sharing import hybrid as one_path_a_block
from tiny import FAMILIES, component, tokens

from modeling_manticore import ManticoreForCausalLM, discretize


def supernet(*families):
    return ManticoreForCausalLM.from_components([component(f, i) for i, f in enumerate(families)], num_blocks=2)


def hybrid(kind, *families):
    return supernet(*families) if kind == "supernet" else discretize(supernet(*families), [0, 1])


@pytest.fixture(autouse=True)
def _fresh():
    dynamo.reset()
    dynamo.utils.counters.clear()
    yield
    dynamo.reset()


@torch.no_grad()
def decode_and_compare(model, compiled):
    """Full forward, prefill and six single tokens against eager; the number of graphs after each."""
    ids = tokens()
    expected, graphs = model(ids).logits, []
    out = compiled(ids, use_cache=False)
    torch.testing.assert_close(out.logits, expected, atol=1e-5, rtol=0)
    for start, stop in [(0, 6), *((t, t + 1) for t in range(6, 12))]:
        cache = out.past_key_values if start else None
        out = compiled(ids[:, start:stop], past_key_values=cache, use_cache=True)
        torch.testing.assert_close(out.logits, expected[:, start:stop], atol=1e-5, rtol=0)
        graphs.append(dynamo.utils.counters["stats"]["unique_graphs"])
    return graphs


@pytest.mark.parametrize(
    "kind, families",
    [
        ("discretized", ("gpt_neox", "mamba2")),
        pytest.param("supernet", ("gpt_neox", "mamba2"), marks=pytest.mark.slow),
        pytest.param("supernet", ("llama", "mamba"), marks=pytest.mark.slow),
        pytest.param("discretized", ("gpt2", "falcon_mamba"), marks=pytest.mark.slow),
    ],
)
def test_compiled_by_dynamo(kind, families):
    model = hybrid(kind, *families)
    graphs = decode_and_compare(model, torch.compile(model, backend="eager", fullgraph=True))
    assert not dynamo.utils.counters["graph_break"]
    assert graphs[0] == 2 and graphs[-1] <= 4 and graphs[3:] == graphs[-1:] * 4  # then one graph serves any length


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_no_family_breaks_the_graph(family):
    """A full forward and a decode step, each as one graph (`fullgraph` raises at the first break)."""
    model, ids = hybrid("discretized", "gpt_neox", family), tokens(2, 6)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    expected = model(ids, use_cache=False).logits
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, expected, atol=1e-5, rtol=0)
    caches = [model(ids[:, :5], use_cache=True).past_key_values for _ in range(2)]
    steps = [run(ids[:, 5:], past_key_values=cache, use_cache=True) for run, cache in zip((model, compiled), caches)]
    torch.testing.assert_close(steps[1].logits, steps[0].logits, atol=1e-5, rtol=0)
    assert not dynamo.utils.counters["graph_break"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("kind", ["supernet", "discretized"])
def test_compiled_by_inductor(kind):
    model = hybrid(kind, "gpt_neox", "mamba2")
    decode_and_compare(model, torch.compile(model))
    assert not dynamo.utils.counters["graph_break"]


def test_gradients_of_a_compiled_supernet():
    def gradients(run):
        model.zero_grad()
        run(input_ids=tokens(), labels=tokens()).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters()}

    model = supernet("gpt_neox", "llama").train()
    plain, compiled = gradients(model), gradients(torch.compile(model, backend="aot_eager", fullgraph=True))
    for name, gradient in plain.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(compiled[name], gradient, atol=float(1e-5 * scale + 1e-7), rtol=0, msg=name)


@torch.no_grad()
def test_compiled_paths_of_weight_zero_run_and_count_nothing():
    model = ManticoreForCausalLM.from_components(
        [component("gpt_neox"), component("llama")], num_blocks=2, mixture="simplex"
    )
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for weights in ([[1, 0], [1, 0]], [[0.5, 0.5], [0, 1]]):  # one graph serves every mixture
        model.set_mixture_weights(weights)
        expected = model(tokens(), use_cache=False).logits
        torch.testing.assert_close(compiled(tokens(), use_cache=False).logits, expected, atol=1e-5, rtol=0)
    assert dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_generate_takes_compiled_passes():
    model = hybrid("discretized", "gpt_neox", "mamba2")
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    ids, mask = tokens(), torch.ones_like(tokens())
    mask[0, :3] = 0
    expected = model.generate(ids, attention_mask=mask, **options)
    model.compile(backend="eager", fullgraph=True)
    found = model.generate(ids, attention_mask=mask, **options)
    assert 1 < dynamo.utils.counters["stats"]["unique_graphs"] <= 4
    for one, other in zip(found.logits, expected.logits, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@torch.no_grad()
def test_compiled_tokens_go_on_from_caches_that_are_not():
    """Each from a cache of its own, which blocks filled together that are compiled one by one; no more graphs."""
    model, ids, graphs = one_path_a_block(["llama"], [(0, 0, 1), (0, 1, 2), (0, 2, 4)]), tokens(), []
    expected = model(ids).logits
    caches = [model(ids[:, :6], use_cache=True).past_key_values for _ in range(3)]
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    for cache in caches:
        for t in range(6, 12):
            out = compiled(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            torch.testing.assert_close(out.logits, expected[:, t : t + 1], atol=1e-5, rtol=0)
        graphs.append(dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[2] <= 2 and not dynamo.utils.counters["graph_break"]


@pytest.mark.parametrize("kind", ["supernet", "discretized"])
@pytest.mark.parametrize(
    "families", [("gpt_neox", "mamba2"), ("gpt2", "mamba"), ("gemma3_text", "falcon_mamba")], ids="+".join
)
@torch.no_grad()
def test_exported(kind, families):
    model, ids = hybrid(kind, *families), tokens()
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    inputs = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    program = torch.export.export(model, (), inputs, strict=False).module()
    torch.testing.assert_close(program(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=0)
    other = inputs | {"input_ids": tokens(seed=5)}
    torch.testing.assert_close(program(**other).logits, model(**other).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["supernet", "discretized"])
@torch.no_grad()
def test_exported_for_any_length_where_all_is_attention(kind):
    model = hybrid(kind, "opt", "qwen3")
    sizes = {0: torch.export.Dim("rows", max=16), 1: torch.export.Dim("tokens", min=2, max=60)}
    inputs = {"input_ids": tokens(), "attention_mask": torch.ones_like(tokens()), "use_cache": False}
    shapes = {"input_ids": sizes, "attention_mask": sizes, "use_cache": None}
    program = torch.export.export(model, (), inputs, strict=False, dynamic_shapes=shapes).module()
    ids = tokens(3, 17)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    torch.testing.assert_close(program(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_recurrent_families_export_one_length(family):
    """Their torch code walks over tokens (mamba) or pads to whole chunks (mamba2): the length becomes part of it."""
    model = hybrid("discretized", "gpt_neox", family)
    shapes = {"input_ids": {1: torch.export.Dim("tokens", min=2, max=60)}, "use_cache": None}
    inputs = {"input_ids": tokens(), "use_cache": False}
    with pytest.raises(torch._dynamo.exc.UserError, match="Constraints violated"):
        torch.export.export(model, (), inputs, strict=False, dynamic_shapes=shapes)
