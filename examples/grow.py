"""A learning rate that is 100 times too low: as it stands, and with growing amplification.

python examples/grow.py
"""

import torch
from torch import nn

import gradamp_fast

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
teacher = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5)).to(device)
inputs = torch.randn(4000, 20, device=device)
labels = teacher(inputs).argmax(1)


def trained(lr: float, grow: bool) -> float:
    """Accuracy on inputs that were held out, after 600 steps."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
    model.append(nn.Linear(64, 5)).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9)
    for _ in range(600):
        here = torch.randint(3000, (32,), device=device)
        loss = nn.functional.cross_entropy(model(inputs[here]), labels[here])
        optimizer.zero_grad()
        loss.backward()
        if grow:
            amplifier = gradamp_fast.fused_amplify(model, grow=True)
        optimizer.step()
    if grow:
        print(amplifier.summary())
    with torch.no_grad():
        return (model(inputs[3000:]).argmax(1) == labels[3000:]).double().mean().item()


growing = trained(0.0005, grow=True)
print(f"learning rate 0.0005 (far too low): {trained(0.0005, grow=False):.1%}")
print(f"learning rate 0.0005, growing:      {growing:.1%}")
print(f"learning rate 0.05 (about right):   {trained(0.05, grow=False):.1%}")
