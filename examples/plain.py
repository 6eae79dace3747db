"""A plain loop: one line between backward() and step(), and a table of what it did.

python examples/plain.py
"""

import torch
from torch import nn

import gradamp_fast

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
model.to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
inputs = torch.randn(2000, 20, device=device)
labels = (inputs[:, :10].sum(1) > 0).long()

for epoch in range(5):
    for batch in torch.randperm(2000, device=device).split(50):
        loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        amplifier = gradamp_fast.fused_amplify(model, min_steps=50, refresh=50)
        optimizer.step()
    print(f"epoch {epoch}: loss {loss.item():.3f}")

print(amplifier.summary())
