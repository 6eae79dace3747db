"""DistributedDataParallel, on GPUs or without: torchrun --nproc-per-node 2 examples/ddp.py"""

import os

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import gradamp_fast

use_cuda = torch.cuda.is_available()
dist.init_process_group("nccl" if use_cuda else "gloo")
rank = dist.get_rank()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_cuda else torch.device("cpu")
if use_cuda:
    torch.cuda.set_device(device)

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
parallel = DistributedDataParallel(model.to(device), gradient_as_bucket_view=True)
optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1, momentum=0.9)
amplifier = gradamp_fast.Amplifier(parallel, min_steps=20, refresh=20)

torch.manual_seed(1 + rank)  # every process has data of its own
inputs = torch.randn(1000, 20, device=device)
labels = (inputs[:, :10].sum(1) > 0).long()

for _ in range(5):
    for batch in torch.randperm(1000, device=device).split(100):
        first, last = batch.split(50)
        optimizer.zero_grad()
        with parallel.no_sync():  # gradients accumulate, not amplified
            nn.functional.cross_entropy(parallel(inputs[first]), labels[first]).backward()
        nn.functional.cross_entropy(parallel(inputs[last]), labels[last]).backward()
        amplifier.step()  # after the backward() that synchronises: all processes decide alike
        optimizer.step()

summary = amplifier.summary()
if rank == 0:
    print(summary)
dist.destroy_process_group()
