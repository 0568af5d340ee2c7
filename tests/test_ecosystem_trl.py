"""TRL's SFTTrainer: its own loss where a hybrid's logits are one product, a refusal elsewhere, and ours everywhere."""

import pytest
import torch
from datasets import Dataset
from ecosystem import hybrid, tiny_tokenizer
from peft import PeftModel
from torch.nn import functional
from trl import SFTConfig, SFTTrainer

from modeling_manticore import ManticoreSFTTrainer, lora_config


PAIR = ("gpt_neox", "mamba2")
DATA = Dataset.from_list(
    [{"text": f"The name of function {i} is bound {'again and ' * (i % 4)}again."} for i in range(24)]
)
PROMPTS = Dataset.from_list([{"prompt": f"Function {i}", "completion": " is bound." * (1 + i % 3)} for i in range(24)])


def arguments(folder, **options):
    plain = {"max_steps": 6, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none"}
    plain |= {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "bf16": False}
    return SFTConfig(output_dir=str(folder), **(plain | {"gradient_checkpointing": False} | options))


def make(trainer_class, folder, model, data=DATA, peft_config=None, **options):
    return trainer_class(
        model=model,
        args=arguments(folder, **options),
        train_dataset=data,
        eval_dataset=data.select(range(8)),
        processing_class=tiny_tokenizer(),
        peft_config=peft_config,
    )


def losses(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@torch.no_grad()
def loss_of(model, batch):
    """Mean negative log-probability of the labels under the model's own logits, the attention mask respected."""
    logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1), batch["labels"][:, 1:].flatten())


@pytest.mark.parametrize("data", [DATA, PROMPTS], ids=["text", "completion"])
@pytest.mark.parametrize(
    "trainer_class, choice",
    [(SFTTrainer, [0, 0]), (SFTTrainer, [1, 0]), (ManticoreSFTTrainer, [1, 0]), (ManticoreSFTTrainer, None)],
    ids=["stock_one_family", "stock_two_families", "ours_discretized", "ours_supernet"],
)
def test_supervised_finetuning(trainer_class, choice, data, tmp_path):
    model = hybrid(PAIR, choice, max_position_embeddings=512)
    trainer = make(trainer_class, tmp_path, model, data)
    batch = next(iter(trainer.get_eval_dataloader()))
    assert batch["attention_mask"].min() == 0
    expected = loss_of(model.eval(), batch)
    with torch.no_grad():
        torch.testing.assert_close(trainer.compute_loss(model, dict(batch)), expected, atol=1e-4, rtol=1e-4)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train()
    assert all(not torch.equal(before[name], p) for name, p in model.named_parameters())
    assert losses(trainer)[-1] < losses(trainer)[0]
    entry = next(entry for entry in trainer.state.log_history if "loss" in entry)
    assert 0 <= entry["mean_token_accuracy"] <= 1 and entry["num_tokens"] > 0
    assert trainer.evaluate()["eval_loss"] < expected


def test_both_trainers_are_one_where_both_can(tmp_path):
    found = []
    for trainer_class in (SFTTrainer, ManticoreSFTTrainer):
        torch.manual_seed(0)
        trainer = make(trainer_class, tmp_path, hybrid(PAIR, [1, 0], max_position_embeddings=512), optim="sgd")
        trainer.train()
        found.append(
            (losses(trainer), trainer.model.state_dict(), trainer.state.log_history[0]["mean_token_accuracy"])
        )
    assert found[0][0] == pytest.approx(found[1][0], abs=1e-3) and found[0][2] == pytest.approx(found[1][2], abs=1e-4)
    for name, tensor in found[0][1].items():
        torch.testing.assert_close(found[1][1][name], tensor, atol=1e-4, rtol=1e-3, msg=name)


REFUSED = {
    "several_heads": (PAIR, None),
    "narrower_head": (PAIR, [0, 1]),
    "soft_cap": (("mamba2", "gemma2"), [0, 1]),
    "scale": (("mamba2", "granitemoehybrid"), [0, 1]),
}


@pytest.mark.parametrize("with_adapter", [False, True], ids=["whole", "adapter"])
@pytest.mark.parametrize("families, choice", REFUSED.values(), ids=REFUSED)
def test_stock_trainer_is_refused_where_its_loss_would_be_wrong(families, choice, with_adapter, tmp_path):
    model = hybrid(families, choice, max_position_embeddings=512)
    with pytest.raises(ValueError, match="forward: got one with `fused_lm_head`.*modeling_manticore.search.sft"):
        make(SFTTrainer, tmp_path, model, peft_config=lora_config(model) if with_adapter else None)
    trainer = make(ManticoreSFTTrainer, tmp_path, model, max_steps=1)
    assert not model.keep_forward
    batch = next(iter(trainer.get_eval_dataloader()))
    with torch.no_grad():
        found = trainer.compute_loss(model.eval(), dict(batch))
    torch.testing.assert_close(found, loss_of(model, batch), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
def test_adapters(checkpointing, tmp_path):
    model = hybrid(PAIR, None, max_position_embeddings=512)
    config = lora_config(model, r=2)
    trainer = make(
        ManticoreSFTTrainer,
        tmp_path,
        model,
        peft_config=config,
        gradient_checkpointing=checkpointing,
        bf16=checkpointing,
    )
    assert isinstance(trainer.model, PeftModel)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    for name, p in trainer.model.named_parameters():
        assert p.requires_grad != torch.equal(before[name], p), name
    assert losses(trainer)[-1] < losses(trainer)[0]


def test_bad_input(tmp_path):
    with pytest.raises(ValueError, match="model: got 'my-hybrid', allowed is a hybrid in memory"):
        make(ManticoreSFTTrainer, tmp_path, "my-hybrid")
    with pytest.raises(ValueError, match="loss_type: got 'dft', allowed is 'nll'"):
        make(ManticoreSFTTrainer, tmp_path, hybrid(PAIR), loss_type="dft")
    with pytest.raises(ValueError, match="model: got Linear, allowed is a hybrid"):
        make(ManticoreSFTTrainer, tmp_path, torch.nn.Linear(2, 2))
