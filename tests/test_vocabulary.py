"""Components with different tokenizers: rows, report, ids, padding, save and load, and targets on own tokens."""

import json
from functools import cache

import pytest
import torch
from tiny import component
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from modeling_manticore import ManticoreForCausalLM, calibrate, discretize
from modeling_manticore.building.alignment import align
from modeling_manticore.building.texts import batches_of
from modeling_manticore.building.vocabulary import Vocabulary, transplant
from modeling_manticore.tasks.text import help_topics, train_tokenizer


TOPICS = help_topics()


def path(k, start, stop):
    return {"component": k, "start": start, "stop": stop}


def llama_like(texts, size):
    """SentencePiece's BPE as converted for Llama: '▁' for spaces, one in front, and byte tokens."""
    trained = Tokenizer(models.BPE(unk_token="<unk>"))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>"]
    trained.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    )
    parts = json.loads(trained.to_str())
    vocabulary = parts["model"]["vocab"]
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    parts["model"]["byte_fallback"] = True
    whole = Tokenizer.from_str(json.dumps(parts))
    whole.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=whole, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def unigram(texts, size):
    """SentencePiece's Unigram with Metaspace, without byte tokens."""
    trained = Tokenizer(models.Unigram())
    trained.pre_tokenizer, trained.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trained.train_from_iterator(
        texts,
        trainers.UnigramTrainer(vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=trained, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def tokenizers():
    return {
        "first": train_tokenizer(TOPICS[:20], 420),
        "second": train_tokenizer([text.upper() for text in TOPICS[20:30]] + TOPICS[30:40], 400),
        "llama": llama_like(TOPICS[:15], 300),
        "unigram": unigram(TOPICS[:15], 300),
    }


def of(family, tokenizer, seed=0, padding=0, **changes):
    """A component whose vocabulary is a tokenizer's, with rows of padding beyond."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    return component(family, seed, vocab_size=len(tokenizer) + padding, **ids | changes)


def embedding(model):
    return model.get_input_embeddings().weight


def head(model):
    return model.get_output_embeddings().weight


PAIRS = [("first", "second"), ("first", "llama"), ("llama", "first"), ("unigram", "first"), ("second", "unigram")]


@pytest.mark.parametrize("pair", PAIRS, ids="<-".join)
def test_every_row_is_copied_averaged_or_the_mean_as_reported(tokenizers, pair):
    """Held against a table of contents made by decoding, and against the own tokenizer's splits of the text."""
    target, own = (tokenizers[name] for name in pair)
    models_ = [of("gpt_neox", target), of("gptj", own, 1, padding=3)]
    hybrid = ManticoreForCausalLM.from_components(models_, num_blocks=2, tokenizers=[target, own])
    matrices = [(embedding(models_[1]), hybrid.model.stems["1"].get_input_embeddings().weight)]
    matrices += [(head(models_[1]), hybrid.heads["1"].get_output_embeddings().weight)]
    bias = models_[1].lm_head.bias
    with torch.no_grad():
        assert bias.shape == (len(own) + 3,)
    matrices += [(bias, hybrid.heads["1"].get_output_embeddings().bias)]

    spelled = {}
    special = set(own.all_special_tokens)
    for token, i in own.get_vocab().items():
        if token not in special:
            spelled.setdefault(plain(token, own), []).append(i)
    seen = {"copied": 0, "same role": 0, "averaged": 0, "mean row": 0, "padding": 0}
    for token, i in target.get_vocab().items():
        text = plain(token, target)
        special_token, roles = token in target.all_special_tokens, role(token, target, own)
        if special_token and token in own.get_vocab():
            kind, rows = "copied", [own.get_vocab()[token]]
        elif special_token and roles:
            kind, rows = "same role", roles[:1]
        elif text in spelled and not special_token:
            kind, rows = "copied", spelled[text]
        else:
            pieces = split(text, own)
            kind, rows = ("averaged" if pieces else "mean row"), pieces
        seen[kind] += 1
        for old, new in matrices:
            if kind == "copied":
                assert any(torch.equal(new[i], old[row]) for row in rows), token
            elif rows:
                mean = sum(old[row].double() for row in rows) / len(rows)
                torch.testing.assert_close(new[i].double(), mean, atol=1e-6, rtol=1e-5, msg=token)
            else:
                mean = old[: len(own)].double().mean(0)
                torch.testing.assert_close(new[i].double(), mean, atol=1e-6, rtol=1e-5, msg=token)
    row = hybrid.transplant_report.components[1]
    assert row.counts == seen and sum(seen.values()) == hybrid.config.vocab_size == len(target)
    assert seen["copied"] and seen["averaged"]
    assert row.transplanted and row.own_size == len(own) + 3
    for count in seen.values():
        assert str(count) in str(hybrid.transplant_report)
    assert json.loads(json.dumps(hybrid.transplant_report.to_dict()))["components"][1]["counts"] == seen
    assert torch.equal(hybrid.model.stems["0"].get_input_embeddings().weight, embedding(models_[0]))
    assert torch.equal(hybrid.heads["0"].get_output_embeddings().weight, head(models_[0]))


def byte_alphabet():
    """The byte-level alphabet: printable bytes stand for themselves, the others for what follows U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


BYTES = byte_alphabet()


@cache
def is_byte_level(tokenizer):
    return any("Ġ" in token for token in tokenizer.get_vocab())


def plain(token, tokenizer):
    """The bytes of a token, by the rules of its kind."""
    if is_byte_level(tokenizer):
        return bytes(BYTES[character] for character in token) if all(c in BYTES for c in token) else token.encode()
    if token.startswith("<0x") and len(token) == 6:
        return bytes([int(token[3:5], 16)])
    return token.replace("▁", " ").encode()


def role(token, target, own):
    names = ("eos_token", "bos_token", "pad_token", "unk_token")
    return [
        own.convert_tokens_to_ids(getattr(own, n)) for n in names if getattr(target, n) == token and getattr(own, n)
    ]


@cache
def without_prefix(own):
    backend = Tokenizer.from_str(own.backend_tokenizer.to_str())
    if "Prepend" in backend.to_str():
        backend.normalizer = normalizers.Replace(" ", "▁")
    elif "Metaspace" in backend.to_str():
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    return backend


def split(content, own):
    """Pieces of a content, with no space put in front and without unknown tokens."""
    try:
        text = content.decode()
    except UnicodeDecodeError:
        table = {plain(t, own): i for t, i in own.get_vocab().items()}
        return [table[bytes([byte])] for byte in content if bytes([byte]) in table]
    unknown = own.convert_tokens_to_ids("<unk>") if "<unk>" in own.get_vocab() else None
    return [i for i in without_prefix(own).encode(text, add_special_tokens=False).ids if i != unknown]


def test_spellings_are_the_same_bytes(tokenizers):
    first, llama = Vocabulary(tokenizers["first"]), Vocabulary(tokenizers["llama"])
    assert (first.spelling, llama.spelling, Vocabulary(tokenizers["unigram"]).spelling) == (
        "bytes",
        "marked",
        "marked",
    )
    word = next(t[1:] for t in llama.ids if t[:1] == "▁" and t[1:].isalpha() and "Ġ" + t[1:] in first.ids)
    spelled = (f"Ġ{word}", f"▁{word}"), f" {word}".encode()
    for spellings, content in (spelled, (("Ċ", "<0x0A>"), b"\n"), (("in", "in"), b"in")):
        for vocabulary, token in zip((first, llama), spellings):
            assert vocabulary.contents[vocabulary.ids[token]] == content, token
        assert llama.counterpart(spellings[0], first.ids[spellings[0]], first) == llama.by_content[content]
    assert llama.contents[llama.ids["<s>"]] is None
    assert [llama.contents[piece] for piece in llama.pieces([b"tq"])[0]] == [b"t", b"q"]  # no space in front
    assert llama.pieces(["é".encode()[:1]]) == [[llama.ids["<0xC3>"]]]


def test_one_tokenizer_under_two_names_changes_nothing(tokenizers, tmp_path):
    first = tokenizers["first"]
    backend = Tokenizer.from_str(first.backend_tokenizer.to_str())
    backend.save(str(tmp_path / "another.json"))
    again = PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "another.json"), eos_token="<|endoftext|>")
    models_ = [of("gpt2", first), of("mamba2", first, 1)]
    hybrid = ManticoreForCausalLM.from_components(models_, num_blocks=2, tokenizers=[first, again])
    for k, model in enumerate(models_):
        assert torch.equal(hybrid.model.stems[str(k)].get_input_embeddings().weight, embedding(model))
        assert torch.equal(hybrid.heads[str(k)].get_output_embeddings().weight, head(model))
        assert not hybrid.transplant_report.components[k].transplanted
        assert not hasattr(hybrid.config.components[k], "own_vocab_size")
    assert hybrid.transplant_report.components[1].counts["copied"] == len(first)


@torch.no_grad()
def test_padded_vocabularies_of_one_tokenizer_are_cut(tokenizers, tmp_path):
    first = tokenizers["first"]
    size, folders = len(first), []
    for family, padding in (("gpt_neox", 12), ("mamba", 4)):
        folders.append(str(tmp_path / family))
        model = of(family, first, padding=padding)
        model.config.pad_token_id = model.generation_config.pad_token_id = size + 2
        model.save_pretrained(folders[-1])
        first.save_pretrained(folders[-1])
    hybrid = ManticoreForCausalLM.from_components(folders, num_blocks=2)
    assert hybrid.config.vocab_size == size and {c.vocab_size for c in hybrid.config.components} == {size}
    assert hybrid.config.pad_token_id is None and hybrid.generation_config.pad_token_id is None
    assert hybrid.config.eos_token_id == first.eos_token_id
    ids = torch.randint(0, size, (2, 9))
    for k, folder in enumerate(folders):
        uncut = AutoModelForCausalLM.from_pretrained(folder)
        hybrid.set_mixture_weights([[1 - k, k]] * 2)
        torch.testing.assert_close(hybrid(ids).logits, uncut(ids).logits[..., :size], atol=1e-6, rtol=0)


@pytest.mark.parametrize("families", [("gpt2", "gptj"), ("gemma2", "mamba")])
@torch.no_grad()
def test_padding_asked_for_has_no_probability(tokenizers, families, tmp_path):
    first, second = tokenizers["first"], tokenizers["second"]
    models_ = [of(families[0], first), of(families[1], second, 1)]
    options = {"num_blocks": 2, "tokenizers": [first, second]}
    plain_hybrid = ManticoreForCausalLM.from_components(models_, **options)
    hybrid = ManticoreForCausalLM.from_components(models_, pad_to_multiple_of=64, **options)
    size = len(first)
    assert hybrid.config.vocab_size == 448 > size == plain_hybrid.config.vocab_size
    assert hybrid.transplant_report.components[1].counts["padding"] == 448 - size
    ids = torch.randint(0, size, (2, 7))
    hybrid.save_pretrained(tmp_path)
    for model in (hybrid, AutoModelForCausalLM.from_pretrained(tmp_path), discretize(hybrid, [0, 1])):
        logits = model(ids).logits
        assert logits[..., size:].max() < -3e38 and logits[..., :size].abs().max() < 1e4
        assert (logits.softmax(-1)[..., size:] == 0).all()
        assert torch.isfinite(model(ids, labels=ids).loss)
    torch.testing.assert_close(hybrid(ids).logits[..., :size], plain_hybrid(ids).logits, atol=1e-5, rtol=0)
    made = hybrid.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=True, pad_token_id=0)
    assert made.max() < size
    with torch.enable_grad():
        hybrid.train()(ids, labels=ids).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in hybrid.parameters() if p.grad is not None)
    hybrid.resize_token_embeddings(450)
    assert torch.isfinite(hybrid.eval()(ids).logits).all()


@torch.no_grad()
def test_tied_heads_stay_tied_and_a_transplanted_hybrid_reloads(tokenizers, tmp_path):
    first, second = tokenizers["first"], tokenizers["llama"]
    models_ = [of("gpt_neox", first), of("gpt2", second, 1, pad_token_id=second.pad_token_id)]
    hybrid = ManticoreForCausalLM.from_components(models_, num_blocks=2, tokenizers=[first, second])
    assert hybrid.heads["1"].get_output_embeddings().weight is hybrid.model.stems["1"].get_input_embeddings().weight
    entry = hybrid.config.components[1]
    assert entry.own_vocab_size == len(second) and entry.vocab_size == len(first)
    assert entry.eos_token_id == first.eos_token_id == hybrid.config.eos_token_id
    hybrid.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = first("The import statement", return_tensors="pt")
    assert torch.equal(loaded(**batch).logits, hybrid(**batch).logits)
    made = [m.generate(**batch, max_new_tokens=6, do_sample=False) for m in (hybrid, loaded)]
    assert torch.equal(*made) and made[0].shape[1] > batch["input_ids"].shape[1]
    alone = discretize(hybrid, [0, 1])
    assert alone.heads["1"].get_output_embeddings().weight.shape == (len(first), 32)
    assert alone.transplant_report is hybrid.transplant_report


def test_ids_of_tokens_that_the_tokenizer_lacks_are_cleared(tokenizers):
    second = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tokenizers["second"].backend_tokenizer.to_str()), eos_token="<|endoftext|>"
    )
    second.add_special_tokens({"sep_token": "<|sep|>"})
    other = of("llama", second, pad_token_id=second.sep_token_id, eos_token_id=[0, second.sep_token_id])
    pair = [of("gpt2", tokenizers["first"]), other]
    hybrid = ManticoreForCausalLM.from_components(pair, num_blocks=2, tokenizers=[tokenizers["first"], second])
    entry = hybrid.config.components[1]
    assert entry.pad_token_id is None and entry.eos_token_id == [0]
    assert hybrid.model.stems["1"].get_input_embeddings().padding_idx is None


def test_half_precision_rows_are_averaged_in_float32(tokenizers):
    rows = transplant(Vocabulary(tokenizers["first"]), Vocabulary(tokenizers["second"]))
    matrix = torch.randn(len(tokenizers["second"]), 8).to(torch.bfloat16)
    assert torch.equal(rows.rows(matrix), rows.rows(matrix.float()).to(torch.bfloat16))


def test_generation_settings_come_from_the_tokenizers_component(tokenizers):
    models_ = [of("gpt2", tokenizers["first"]), of("mamba2", tokenizers["second"], 1)]
    models_[1].generation_config.temperature = 0.25
    hybrid = ManticoreForCausalLM.from_components(
        models_, blocks=[[path(0, 0, 4)]], tokenizer_from=1, tokenizers=[tokenizers["first"], tokenizers["second"]]
    )
    assert hybrid.generation_config.temperature == 0.25 and hybrid.config.vocab_size == len(tokenizers["second"])


def ends(tokenizer, ids):
    """Bytes read after each token, from the tokens' bytes alone."""
    lengths = [
        0 if i in tokenizer.all_special_ids else len(plain(tokenizer.convert_ids_to_tokens(i), tokenizer)) for i in ids
    ]
    return torch.tensor(lengths).cumsum(0).tolist()


@pytest.mark.parametrize("name", ["second", "llama"])
def test_positions_match_where_tokens_end_at_one_byte(tokenizers, name):
    first, own = tokenizers["first"], tokenizers[name]
    texts = ["Größe – naïve 'café' ≥ 3\n  next line", "The import statement, e.g. import os", "x"]
    hybrid = ManticoreForCausalLM.from_components([of("gpt2", first)], num_blocks=1)
    for batch in batches_of(texts * 2, hybrid, first, batch_size=3):
        aligned = align(batch, Vocabulary(first), Vocabulary(own), None)
        for r, text in enumerate(batch.texts):
            there, here = ends(first, first(text)["input_ids"]), ends(own, own(text)["input_ids"])
            here = [end - (name == "llama") for end in here]  # less the space in front
            expected = [end in here for end in there]
            assert aligned.matched[r, : len(there)].tolist() == expected, text
            for i, end in enumerate(there):
                if end in here:
                    assert here[aligned.positions[r, i]] == end
            assert not aligned.matched[r, len(there) :].any()
            assert aligned.matched[r, len(there) - 1]


@torch.no_grad()
def test_own_targets_are_the_uncut_components_states_on_its_own_tokens(tokenizers):
    """With a bridge onto layer 0 of the second component, the target is its own embedding of the matched token."""
    first, second = tokenizers["first"], tokenizers["second"]
    pair = [of("gpt_neox", first), of("llama", second, 1)]
    texts = [text[i : i + 200] for text in TOPICS[:12] for i in range(0, 1000, 200)]
    hybrid = ManticoreForCausalLM.from_components(
        pair, blocks=[[path(0, 0, 2)], [path(1, 0, 4)]], tokenizers=[first, second]
    )
    known = {"components": pair, "tokenizers": [first, second], "progress": False}
    report = calibrate(hybrid, texts, first, targets="own", **known)
    inputs, targets = [], []
    for batch in batches_of(texts, hybrid, first):
        aligned = align(batch, Vocabulary(first), Vocabulary(second), 64)
        states = pair[0].gpt_neox(batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True)
        inputs.append(states.hidden_states[2][aligned.matched])
        rows = torch.arange(len(batch.texts))[:, None].expand_as(aligned.positions)[aligned.matched]
        targets.append(embedding(pair[1])[aligned.batch.input_ids[rows, aligned.positions[aligned.matched]]])
    x, y = torch.cat(inputs).double(), torch.cat(targets).double()
    assert report.matched == {1: pytest.approx(len(x) / report.tokens)} and 0.2 < report.matched[1] < 1
    assert report.fits[0].tokens == len(x) and f"{report.matched[1]:.1%}" in str(report)
    centred = x - x.mean(0)
    penalty = report.fits[0].strength * (centred**2).sum(0).mean() * torch.eye(32, dtype=torch.float64)
    weight = torch.linalg.solve(centred.T @ centred + penalty, centred.T @ (y - y.mean(0))).T
    bridge = hybrid.model.blocks[1].paths[0].in_projector
    torch.testing.assert_close(bridge.weight.double(), weight, atol=1e-4, rtol=1e-3)

    calibrate(hybrid, texts, first, targets="transplanted", **known)
    assert not torch.allclose(bridge.weight.double(), weight, atol=1e-2)
    supernet = ManticoreForCausalLM.from_components(pair, num_blocks=2, tokenizers=[first, second])
    report = calibrate(supernet, texts, first, targets="own", **known)
    assert set(report.matched) == {1}
    assert {fit.tokens for fit in report.fits} == {report.tokens, round(report.matched[1] * report.tokens)}


@torch.no_grad()
def test_a_transplanted_hybrid_calibrates_from_its_recorded_sources(tokenizers, tmp_path):
    """The uncut component is loaded again with the hybrid's vocabulary, or with its own tokenizer."""
    folders = []
    for family, name in (("gpt_neox", "first"), ("llama", "second")):
        folders.append(str(tmp_path / family))
        of(family, tokenizers[name]).save_pretrained(folders[-1])
        tokenizers[name].save_pretrained(folders[-1])
    pair = [AutoModelForCausalLM.from_pretrained(folder) for folder in folders]
    names = [tokenizers["first"], tokenizers["second"]]
    texts = [text[i : i + 200] for text in TOPICS[:10] for i in range(0, 800, 200)]
    blocks = [[path(0, 0, 2)], [path(1, 2, 4)]]
    for targets, own in (("own", True), ("transplanted", False), (None, True)):
        named = ManticoreForCausalLM.from_components(folders, blocks=blocks)
        given = ManticoreForCausalLM.from_components(pair, blocks=blocks, tokenizers=names)
        report = calibrate(named, texts, targets=targets, progress=False)
        assert bool(report.matched) == own
        calibrate(given, texts, names[0], targets=targets, components=pair, tokenizers=names, progress=False)
        for name, tensor in named.state_dict().items():
            torch.testing.assert_close(given.state_dict()[name], tensor, msg=name)
    assert not calibrate(named, torch.randint(0, 400, (40, 8)), progress=False).matched


def refused(message, models_, **options):
    with pytest.raises(ValueError, match=message):
        ManticoreForCausalLM.from_components(models_, num_blocks=2, **options)


def test_bad_vocabularies(tokenizers):
    first, second = tokenizers["first"], tokenizers["second"]
    pair = [of("gpt2", first), of("mamba2", second)]
    missing = rf"components\[1\].vocab_size: got {len(second)}, component 0 has {len(first)}, and component"
    refused(missing + " 0 comes with no tokenizer", pair)
    refused(missing + " 1 comes with no tokenizer", pair, tokenizers=[first, None])
    refused("tokenizers: got .*allowed is a list of 2", pair, tokenizers=[first])
    refused(r"tokenizers\[1\]: got int", pair, tokenizers=[first, 3])
    refused(r"tokenizers\[1\] \(nowhere.*there is no such folder", pair, tokenizers=[first, "nowhere/at/all"])
    refused(
        rf"components\[0\]: its tokenizer has {len(first)} tokens, allowed is at most its vocab_size, {len(second)}",
        [of("gpt2", second), of("mamba2", second)],
        tokenizers=[first, second],
    )
    refused("pad_to_multiple_of: got 0", pair, tokenizers=[first, second], pad_to_multiple_of=0)
    refused("tokenizer_from: got 2, allowed is 0..1", pair, tokenizers=[first, second], tokenizer_from=2)
    hybrid = ManticoreForCausalLM.from_components(pair, num_blocks=2, tokenizers=[first, second])
    ids = torch.randint(0, 400, (40, 8))
    for options, message in (
        ({"targets": "both"}, "targets: got 'both', allowed are 'own', 'transplanted' and None"),
        ({"targets": "own"}, "targets: got 'own' with rows of token ids"),
        ({"tokenizers": [first]}, "tokenizers: got .*allowed is a list of 2"),
    ):
        with pytest.raises(ValueError, match=message):
            calibrate(hybrid, ids, progress=False, **options)
    with pytest.raises(ValueError, match=r"components\[1\]: its own hidden states are needed"):
        calibrate(hybrid, ["some text"] * 4, first, targets="own", progress=False)
