"""Ways of continuing a text: each is exact in its logits, or an error says why and what to do."""

import copy

import pytest
import torch
import transformers as T
from family_checks import chain, largest
from tiny import FAMILIES, component, tokens
from transformers import DynamicCache, GenerationConfig

from modeling_manticore import ManticoreForCausalLM, discretize
from modeling_manticore.cache_manticore import ManticoreCache
from modeling_manticore.forward_manticore import is_recurrent


BOUND = 2e-5


def supernet(*families, **options):
    return ManticoreForCausalLM.from_components(
        [component(f, i) for i, f in enumerate(families)], num_blocks=2, **options
    )


CROPPABLE = {  # attention, and convolutions that can be rolled back
    "gpt_neox+qwen3": lambda: supernet("gpt_neox", "qwen3"),
    "llama+lfm2": lambda: supernet("llama", "lfm2"),
    "discrete gpt2-olmo2": lambda: discretize(supernet("gpt2", "olmo2"), [0, 1]),
}
RECURRENT = {
    "gpt_neox+mamba": lambda: supernet("gpt_neox", "mamba"),
    "jamba+mamba2": lambda: supernet("jamba", "mamba2"),
    "discrete recurrent_gemma-gpt_neo": lambda: discretize(supernet("recurrent_gemma", "gpt_neo"), [0, 1]),
    "discrete llama-falcon_mamba": lambda: discretize(supernet("llama", "falcon_mamba"), [0, 1]),
}
if "recurrent_gemma" not in FAMILIES:  # an older transformers
    del RECURRENT["discrete recurrent_gemma-gpt_neo"]
HYBRIDS = CROPPABLE | RECURRENT


@pytest.fixture(scope="module", params=HYBRIDS)
def hybrid(request):
    return HYBRIDS[request.param]()


@pytest.fixture(scope="module", params=CROPPABLE)
def croppable(request):
    return CROPPABLE[request.param]()


@pytest.fixture(scope="module", params=RECURRENT)
def recurrent(request):
    return RECURRENT[request.param]()


def generate(model, ids, **options):
    """Greedy generation with the logits of every step, and none of the special tokens."""
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    settings |= {"output_logits": True, "return_dict_in_generate": True} | options
    return model.generate(ids, attention_mask=torch.ones_like(ids), **settings)


@torch.no_grad()
def assert_logits_are_those_of_a_full_forward(model, out, prompt_length):
    full = model(out.sequences[:, :-1]).logits[:, prompt_length - 1 :]
    assert len(out.logits) == full.shape[1]
    assert largest(torch.stack(out.logits, dim=1), full) <= BOUND


@torch.no_grad()
def test_a_conversation_of_several_turns(hybrid):
    """Turns of several tokens and of one, after a left-padded first turn."""
    ids = tokens(2, 20)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    cache, parts = None, []
    for start, stop in ((0, 6), (6, 7), (7, 12), (12, 13), (13, 20)):
        out = hybrid(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    found = torch.cat(parts, dim=1)
    assert largest(found[1], hybrid(ids[1:]).logits[0]) <= BOUND
    assert largest(found[0, 3:], hybrid(ids[:1, 3:]).logits[0]) <= BOUND


def test_generate_continues_a_cache(hybrid):
    first = generate(hybrid, tokens(1, 5), max_new_tokens=3)
    turn = torch.cat([first.sequences, tokens(1, 4, seed=3)], dim=1)
    second = generate(hybrid, turn, past_key_values=first.past_key_values, max_new_tokens=3)
    assert_logits_are_those_of_a_full_forward(hybrid, second, turn.shape[1])


@pytest.mark.parametrize("chunk", [1, 3, 4])
def test_prefill_in_chunks(hybrid, chunk):
    ids = tokens(2, 10)
    assert_logits_are_those_of_a_full_forward(hybrid, generate(hybrid, ids, prefill_chunk_size=chunk), 10)


def test_prompt_lookup_and_assistants(croppable):
    ids = tokens(1, 4).repeat(1, 3)  # repeats itself, so that there is something to look up
    out = generate(croppable, ids, prompt_lookup_num_tokens=3)
    assert_logits_are_those_of_a_full_forward(croppable, out, ids.shape[1])
    out = generate(croppable, ids, assistant_model=component("llama", 7))
    assert_logits_are_those_of_a_full_forward(croppable, out, ids.shape[1])


def test_a_hybrid_as_assistant(croppable):
    model, ids = component("llama", 7), tokens(1, 8)
    out = generate(model, ids, assistant_model=copy.deepcopy(croppable))
    assert_logits_are_those_of_a_full_forward(model, out, 8)


def test_recurrent_hybrids_refuse_what_needs_a_rollback(recurrent):
    for options in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": component("llama", 7)}):
        with pytest.raises(ValueError, match="not supported with stateful models"):
            generate(recurrent, tokens(1, 8), **options)
    with pytest.raises(ValueError, match="tokens_to_remove: got -2, allowed is 0: the recurrent states"):
        recurrent(tokens(), use_cache=True).past_key_values.crop(-2)


@torch.no_grad()
def test_a_cropped_cache_continues_exactly(croppable):
    ids = tokens(2, 12)
    cache = ManticoreCache(croppable.config)
    cache.activate_past_recording()
    croppable(torch.cat([ids[:, :8], tokens(2, 3, seed=5)], dim=1), past_key_values=cache, use_cache=True)
    cache.crop(-3)
    assert cache.get_seq_length() == 8
    out = croppable(ids[:, 8:], past_key_values=cache, use_cache=True)
    assert largest(out.logits, croppable(ids).logits[:, 8:]) <= BOUND


@torch.no_grad()
def test_a_copied_cache_is_a_place_to_come_back_to(hybrid):
    ids = tokens(2, 12)
    cache = hybrid(ids[:, :8], use_cache=True).past_key_values
    kept = copy.deepcopy(cache)
    hybrid(tokens(2, 3, seed=5), past_key_values=cache, use_cache=True)
    out = hybrid(ids[:, 8:], past_key_values=kept, use_cache=True)
    assert largest(out.logits, hybrid(ids).logits[:, 8:]) <= BOUND


@torch.no_grad()
def test_a_cache_that_was_reset_is_as_new(hybrid):
    ids = tokens(2, 12)
    cache = hybrid(tokens(2, 5, seed=5), use_cache=True).past_key_values
    cache.reset()
    first = hybrid(ids[:, :7], past_key_values=cache, use_cache=True).logits
    second = hybrid(ids[:, 7:], past_key_values=cache, use_cache=True).logits
    assert largest(torch.cat([first, second], dim=1), hybrid(ids).logits) <= BOUND


@pytest.mark.parametrize("kind", ["static", "offloaded", "quantized", "offloaded_static"])
def test_other_caches_are_refused(hybrid, kind):
    with pytest.raises(ValueError, match=f"cache_implementation: got '{kind}', allowed are None and 'dynamic'"):
        generate(hybrid, tokens(), cache_implementation=kind)


def test_foreign_caches_are_refused(hybrid):
    with pytest.raises(ValueError, match="past_key_values: got DynamicCache, allowed is a ManticoreCache"):
        generate(hybrid, tokens(), past_key_values=DynamicCache())


def test_sampling_and_several_sequences(hybrid):
    torch.manual_seed(0)
    ids = tokens(2, 8)
    options = {"do_sample": True, "num_return_sequences": 3, "top_k": 0}
    out = generate(hybrid, ids, **options)
    assert out.sequences.shape == (6, 14)
    assert_logits_are_those_of_a_full_forward(hybrid, out, 8)


def test_padding_within_a_row_is_exact_or_refused(hybrid):
    """A second turn with padding: attention masks it, a recurrence cannot."""
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, 6:8] = 0
    with torch.no_grad():
        cache = hybrid(ids[:, :6], use_cache=True).past_key_values
        if is_recurrent(hybrid.config):
            with pytest.raises(ValueError, match="attention_mask: got padding after the first tokens"):
                hybrid(ids[:, 6:], attention_mask=mask, past_key_values=cache)
        else:
            found = hybrid(ids[:, 6:], attention_mask=mask, past_key_values=cache).logits[0, 2:]
            alone = hybrid(torch.cat([ids[:1, :6], ids[:1, 8:]], dim=1)).logits[0, 6:]
            assert largest(found, alone) <= BOUND


def test_packed_sequences_are_refused_where_states_would_leak(hybrid):
    ids = tokens(1, 10)
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4, 5]])
    if is_recurrent(hybrid.config):
        with pytest.raises(ValueError, match="position_ids: got positions that start again"):
            hybrid(ids, position_ids=positions)
        return
    with torch.no_grad():
        packed = hybrid(ids, position_ids=positions, use_cache=False).logits
        for part in (slice(0, 4), slice(4, 10)):
            assert largest(packed[:, part], hybrid(ids[:, part]).logits) <= BOUND


def test_masks_that_are_none_of_padding_are_refused(hybrid):
    with pytest.raises(ValueError, match="attention_mask: got .* allowed is the padding mask"):
        hybrid(tokens(), attention_mask=torch.ones(2, 1, 12, 12))


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_several_tokens_on_a_filled_cache_in_every_family(family):
    ids = tokens(2, 16)
    hybrid = chain(component(family), [0, 1, component(family).config.num_hidden_layers])
    cache, parts = None, []
    for start, stop in ((0, 5), (5, 11), (11, 16)):
        out = hybrid(ids[:, start:stop], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        parts.append(out.logits)
    assert largest(torch.cat(parts, dim=1), hybrid(ids).logits) <= BOUND


def test_generation_settings_are_checked_before_anything_is_computed(hybrid):
    settings = GenerationConfig(cache_implementation="static", max_new_tokens=2, eos_token_id=None, pad_token_id=0)
    with pytest.raises(ValueError, match="cache_implementation"):
        hybrid.generate(tokens(), generation_config=settings)


def test_padding_in_later_passes_and_within_rows_is_refused_by_recurrent_hybrids(recurrent):
    """One token at a time through the padding, a row all padding in the first pass, right padding and then more."""
    ids = tokens(2, 12)
    left, right, inner = (torch.ones_like(ids) for _ in range(3))
    left[0, :6], right[0, 6:8], inner[0, 3:5] = 0, 0, 0
    cases = ((left, 4), (left, 1), (right, 8))
    for mask, first in cases:
        cache = recurrent(ids[:, :first], attention_mask=mask[:, :first], use_cache=True).past_key_values
        with pytest.raises(ValueError, match="attention_mask: got padding after the first tokens"):
            recurrent(ids[:, first : first + 1], attention_mask=mask[:, : first + 1], past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask: got padding after the first tokens"):
        recurrent(ids, attention_mask=inner)
    assert torch.isfinite(recurrent(ids[:, :8], attention_mask=right[:, :8]).logits).all()  # right padding alone


@torch.no_grad()
def test_positions_of_padding_do_not_matter(hybrid):
    ids = tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).masked_fill(mask == 0, 1)
    found = hybrid(ids, attention_mask=mask, position_ids=positions).logits[0, 4:]
    assert largest(found, hybrid(ids[:1, 4:]).logits[0]) <= BOUND


SHAPES = {
    "mask of new tokens only": (
        {"attention_mask": torch.ones(2, 1)},
        r"attention_mask: got shape \(2, 1\), allowed is \(2, 9\)",
    ),
    "mask of another batch": ({"attention_mask": torch.ones(1, 9)}, r"attention_mask: got shape \(1, 9\)"),
    "positions": ({"position_ids": torch.zeros(2, 3, dtype=torch.long)}, r"position_ids: got shape \(2, 3\)"),
    "one-dimensional tokens": ({"input_ids": torch.tensor([3])}, r"input_ids: got shape \(1,\)"),
    "no tokens": ({"input_ids": torch.zeros(2, 0, dtype=torch.long)}, r"input_ids: got shape \(2, 0\)"),
}


@pytest.mark.parametrize("inputs, message", SHAPES.values(), ids=SHAPES)
def test_shapes_that_do_not_fit_the_cache_are_refused(hybrid, inputs, message):
    cache = hybrid(tokens(2, 8), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=message):
        hybrid(**({"input_ids": tokens(2, 1)} | inputs), past_key_values=cache)


def test_a_path_switched_on_after_the_cache_was_filled_is_refused():
    model = supernet("gpt_neox", "mamba", mixture="simplex")
    model.set_mixture_weights([[1, 0], [1, 0]])
    cache = model(tokens(2, 8), use_cache=True).past_key_values
    model.set_mixture_weights([[1, 0], [0.5, 0.5]])
    with pytest.raises(ValueError, match="past_key_values: path 1 of block 1 had weight 0"):
        model(tokens(2, 1), past_key_values=cache)


def test_longrope_beyond_its_switch_is_refused_with_a_cache():
    """phi3's keys in the cache have the short factors; uncut generation drops the cache there."""
    config = FAMILIES["phi3"]()
    factors = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [3.0] * 4}
    config.rope_parameters = factors | {"original_max_position_embeddings": 8}
    config.original_max_position_embeddings = 8
    hybrid = chain(T.AutoModelForCausalLM.from_config(config).eval(), [0, 2, 4])
    cache = hybrid(tokens(1, 8), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="past_key_values: got a cache of 8 tokens, allowed beyond 8 tokens is none"):
        hybrid(tokens(1, 1), past_key_values=cache)
    cache = hybrid(tokens(1, 9), use_cache=True).past_key_values
    found = hybrid(tokens(1, 12)[:, 9:], past_key_values=cache).logits
    assert largest(found, hybrid(torch.cat([tokens(1, 9), tokens(1, 12)[:, 9:]], 1)).logits[:, 9:]) <= BOUND


@torch.no_grad()
def test_falcon_h1_with_limited_time_steps_decodes_exactly():
    config = FAMILIES["falcon_h1"]()
    config.time_step_limit = (0.3, 0.6)
    hybrid, ids = chain(T.AutoModelForCausalLM.from_config(config).eval(), [0, 2, 4]), tokens(2, 12)
    cache = hybrid(ids[:, :8], use_cache=True).past_key_values
    parts = [hybrid(ids[:, t : t + 1], past_key_values=cache, use_cache=True).logits for t in range(8, 12)]
    assert largest(torch.cat(parts, dim=1), hybrid(ids).logits[:, 8:]) <= BOUND


def test_components_in_memory_must_be_plain_and_whole():
    classifier = T.AutoModelForSequenceClassification.from_config(FAMILIES["gpt_neox"]())
    with pytest.raises(ValueError, match=r"components\[0\]: got GPTNeoXForSequenceClassification"):
        ManticoreForCausalLM.from_components([classifier], num_blocks=1)
    with pytest.raises(ValueError, match=r"components\[0\]: got GPTNeoXModel"):
        ManticoreForCausalLM.from_components([component("gpt_neox").gpt_neox], num_blocks=1)
    shortened = component("gpt_neox")
    shortened.gpt_neox.layers = shortened.gpt_neox.layers[:2]
    with pytest.raises(ValueError, match="it has no list of 4 layers"):
        ManticoreForCausalLM.from_components([shortened], num_blocks=1)
