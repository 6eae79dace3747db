"""A whole training step in one CUDA graph: forward, backward, amplify, update.

python examples/cuda_graph.py
"""

import torch
from torch import nn

import gradamp_fast


def main():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2)).cuda()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    amplifier = gradamp_fast.Amplifier(model, min_steps=20, refresh=20)
    inputs = torch.randn(50, 20, device="cuda")  # each replay reads and writes the same memory
    labels = torch.zeros(50, dtype=torch.long, device="cuda")

    def step():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        amplifier.step()
        optimizer.step()
        return loss

    stream = torch.cuda.Stream()  # what a capture needs: a few steps on another stream first
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)

    graph = torch.cuda.CUDAGraph()
    optimizer.zero_grad()
    with torch.cuda.graph(graph):
        loss = step()

    for number in range(200):
        inputs.normal_()
        labels.copy_(inputs[:, :10].sum(1) > 0)
        graph.replay()
        if number % 50 == 49:
            print(f"step {number + 1}: loss {loss.item():.3f}")
    print(amplifier.summary())


if torch.cuda.is_available():
    main()
else:
    print("A CUDA graph needs an NVIDIA GPU, and there is none here.")
