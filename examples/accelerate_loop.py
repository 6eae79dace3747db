"""Accelerate: an attached amplifier, with gradient accumulation and a checkpoint.

python examples/accelerate_loop.py, or: accelerate launch examples/accelerate_loop.py
"""

import tempfile

import torch
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import gradamp_fast

torch.manual_seed(0)
inputs = torch.randn(800, 20)
labels = (inputs[:, :10].sum(1) > 0).long()

accelerator = Accelerator(gradient_accumulation_steps=2)
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))
model, optimizer, loader = accelerator.prepare(
    model,
    torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9),
    DataLoader(TensorDataset(inputs, labels), batch_size=16, shuffle=True),
)
amplifier = gradamp_fast.Amplifier(model, min_steps=20, refresh=20, max_norm=1.0)
amplifier.attach(optimizer)
accelerator.register_for_checkpointing(amplifier)

with tempfile.TemporaryDirectory() as folder:
    for epoch in range(4):
        amplifier.set_epoch(epoch)
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.cross_entropy(model(x), y)
                accelerator.backward(loss)
                optimizer.step()  # amplifies, and only where gradients are complete
                optimizer.zero_grad()
        accelerator.save_state(folder)  # accelerator.load_state(folder) goes on from here

accelerator.print(amplifier.summary())
