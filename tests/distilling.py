"""Small students, teachers and batches for the tests of distillation, and its loss written out in float64."""

import torch
from tiny import component, tokens

from modeling_manticore import (
    ManticoreForCausalLM,
    ManticoreTrainer,
    ManticoreTrainingArguments,
)
from modeling_manticore.building.states import Batch, boundaries


def path(k, start, stop):
    return {"component": k, "start": start, "stop": stop}


CHAIN = [[path(0, 0, 1)], [path(1, 1, 2)], [path(0, 2, 4)]]


def loud(model):
    """Larger logits, so that probabilities of random models differ."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)
    return model


def parts():
    return [loud(component("gpt_neox")), loud(component("mamba2", 1))]


def hybrid(components=None, blocks=CHAIN):
    torch.manual_seed(0)
    return ManticoreForCausalLM.from_components(components or parts(), blocks=blocks)


def rows(count=16, seed=3):
    """Rows of which every third has no label in its first half."""
    data = [{"input_ids": row, "labels": row.clone()} for row in tokens(count, 10, seed)]
    for row in data[::3]:
        row["labels"][:5] = -100
    return data


def padded():
    """A batch with left and right padding."""
    ids, mask = tokens(3, 10, seed=5), torch.ones(3, 10, dtype=torch.long)
    mask[0, 7:], mask[1, :4] = 0, 0
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.where(mask.bool(), ids, -100)}


def arguments(folder, **options):
    plain = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "report_to": "none"}
    plain |= {"logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "stage": "distill"}
    return ManticoreTrainingArguments(output_dir=str(folder), **(plain | options))


def trainer_of(folder, model, teacher, data=None, callbacks=None, **options):
    args = arguments(folder, **options)
    return ManticoreTrainer(
        model=model, args=args, train_dataset=rows() if data is None else data, teacher=teacher, callbacks=callbacks
    )


def training_loss(trainer, inputs, num_items=None):
    trainer.model.train()
    with torch.no_grad():
        return trainer.compute_loss(trainer.model, dict(inputs), num_items_in_batch=num_items).double()


def positions(mask):
    return (mask.cumsum(-1) - 1).clamp_min(0)


@torch.no_grad()
def expected_loss(student, teacher, inputs, w, temperature, m=0.0, num_items=None):
    """The formula, place by place, in float64."""
    mask, labels = inputs["attention_mask"], inputs["labels"]
    given = {"input_ids": inputs["input_ids"], "attention_mask": mask, "position_ids": positions(mask)}
    said, answer = teacher(**given, output_hidden_states=True), student(**given).logits.double()
    steps = list(boundaries(student, Batch(inputs["input_ids"], mask)))
    bridge = student.model.blocks[2].paths[0].in_projector
    pairs = [(steps[1].states[0], said.hidden_states[1]), (bridge(steps[2].states[0]), said.hidden_states[2])]
    total, count = 0.0, 0
    for i in range(len(labels)):
        for t in range(labels.shape[1] - 1):
            if labels[i, t + 1] == -100:
                continue
            z, s = said.logits[i, t].double(), answer[i, t]
            label_loss = -torch.log(s.exp() / s.exp().sum())[labels[i, t + 1]]
            total, count = total + (1 - w) * label_loss, count + 1
            if not mask[i, t]:
                continue  # the last place of left padding: nothing was read
            p, q = ((x / temperature).exp() / (x / temperature).exp().sum() for x in (z, s))
            error = sum(
                ((u[i, t] - v[i, t]) ** 2).double().sum() / ((v[i, t] - v[i, t].mean()) ** 2).double().sum()
                for u, v in pairs
            )
            total += w * temperature**2 * (p * (p / q).log()).sum() + m * error / len(pairs)
    return total / (count if num_items is None else num_items)
