"""Trains with Transformers' Trainer and with Accelerate, and saves the parameters of some steps.

python trainer.py OUT.pt                                     # one process, the joint batch
torchrun --standalone --nproc-per-node 2 trainer.py OUT.pt   # two, half of it each
"""

import os
import sys
import tempfile

import torch
from accelerate import Accelerator
from distributed import BATCH, STEPS, Model, loss_of
from distributed import data as batch_of_step
from transformers import Trainer, TrainerCallback, TrainingArguments

import deq_phantom_plugin as dpp
from deq_phantom_plugin.adapters.transformer import (
    DEQTransformerConfig,
    DEQTransformerForCausalLM,
    SetStep,
)
from in_processes import leave

SPECS = ["ift", "jfb", "npg", "schedule({0: 'jfb', 5: 'npg'})", "upg", "upg(k=3, checkpoint=True)"]
WORLD = int(os.environ.get("WORLD_SIZE", 1))
ACCUMULATE = (1, 2) if WORLD > 1 else (1,)  # one process sees the joint batch at once
VOCAB, LENGTH = 17, 6


class Texts(torch.utils.data.Dataset):
    """Sequences that count differently: each has another number of tokens without a label."""

    def __init__(self):
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(VOCAB, (BATCH * STEPS, LENGTH), generator=generator)
        self.labels = self.ids.clone()
        for i, labels in enumerate(self.labels):
            labels[: i % (LENGTH - 1)] = -100

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, i):
        return {"input_ids": self.ids[i], "labels": self.labels[i]}


def parameters(model):
    return {name: p.detach().clone() for name, p in model.named_parameters()}


class Record(TrainerCallback):
    """The parameters at the beginning and after each step."""

    def __init__(self):
        self.found = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.found.append(parameters(kwargs["model"]))

    on_step_end = on_train_begin


def by_trainer(spec, accumulate, folder):
    torch.manual_seed(0)
    config = DEQTransformerConfig(
        vocab_size=VOCAB,
        hidden_size=8,
        intermediate_size=16,
        num_attention_heads=2,
        max_position_embeddings=LENGTH,
        grad=spec,
        f_solver="broyden",
        f_max_iter=80,
        f_tol=1e-13,
    )
    record = Record()
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=STEPS,
        per_device_train_batch_size=BATCH // WORLD // accumulate,
        gradient_accumulation_steps=accumulate,
        optim="sgd",
        learning_rate=0.3,
        lr_scheduler_type="constant",
        use_cpu=True,
        ddp_backend="gloo" if WORLD > 1 else None,
        ddp_timeout=20,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    model = DEQTransformerForCausalLM(config).double()
    trainer = Trainer(model, arguments, train_dataset=Texts(), callbacks=[SetStep(), record])
    trainer.train()
    assert trainer.accelerator.num_processes == WORLD
    return record.found


def by_accelerate(spec, accumulate, folder):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulate)
    assert accelerator.num_processes == WORLD
    model = Model(spec, "sliced")
    batches = [batch_of_step(step) for step in range(STEPS)]
    inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
    model, optimizer, loader = accelerator.prepare(
        model,
        torch.optim.SGD(model.parameters(), 0.3, momentum=0.9),
        torch.utils.data.DataLoader(
            torch.utils.data.TensorDataset(inputs, targets), BATCH // WORLD // accumulate
        ),
    )
    plain = accelerator.unwrap_model(model)
    found = [parameters(plain)]
    for x, y in loader:
        dpp.set_step(model, len(found) - 1)
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, x, y))
            optimizer.step()
            optimizer.zero_grad()
        if accelerator.sync_gradients:
            found.append(parameters(plain))
    return found


RUNNERS = {"trainer": by_trainer, "accelerate": by_accelerate}


def main():
    torch.set_num_threads(1)
    dpp.enable("torchdeq")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, train in RUNNERS.items():
            for spec in SPECS:
                for accumulate in ACCUMULATE:
                    states = train(spec, accumulate, folder)
                    assert len(states) == STEPS + 1
                    found[name, spec, accumulate] = [states[i] for i in (0, 1, STEPS)]
    if int(os.environ.get("RANK", 0)) == 0:
        torch.save(found, sys.argv[1])
    leave()


if __name__ == "__main__":
    main()
