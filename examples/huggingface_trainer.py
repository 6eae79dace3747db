"""Hugging Face Trainer: a callback amplifies; a checkpoint brings it back.

python examples/huggingface_trainer.py
"""

import tempfile

import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from gradamp_fast import Schedule
from gradamp_fast.integrations.huggingface import GradientAmplificationCallback


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))

    def forward(self, inputs, labels):
        logits = self.net(inputs)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


torch.manual_seed(0)
inputs = torch.randn(800, 20)
labels = (inputs[:, :10].sum(1) > 0).long()
data = [{"inputs": x, "labels": y} for x, y in zip(inputs, labels, strict=True)]

model = Model()
amplification = GradientAmplificationCallback(
    min_steps=20,
    refresh=20,
    schedule=Schedule([(0, 3)], unit="epoch"),
    max_norm=1.0,  # clips what was amplified; the Trainer's own comes too early
)
with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            folder,
            num_train_epochs=4,
            per_device_train_batch_size=32,
            max_grad_norm=0,
            report_to="none",
        ),
        train_dataset=data,
        optimizers=(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), None),
        callbacks=[amplification],
    )
    trainer.train()  # resume_from_checkpoint=True goes on, amplifier included

print(amplification.amplifier.summary())
