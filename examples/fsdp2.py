"""FSDP2 and a checkpoint, on GPUs or without: torchrun --nproc-per-node 2 examples/fsdp2.py"""

import os
import tempfile

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.fsdp import fully_shard

import gradamp_fast

use_cuda = torch.cuda.is_available()
dist.init_process_group("nccl" if use_cuda else "gloo")
rank = dist.get_rank()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if use_cuda else torch.device("cpu")
if use_cuda:
    torch.cuda.set_device(device)
mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
model.to(device)
for module in (*model, model):
    if any(True for _ in module.parameters()):
        fully_shard(module, mesh=mesh)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
amplifier = gradamp_fast.Amplifier(model, min_steps=20, refresh=20)
amplifier.attach(optimizer)

torch.manual_seed(1 + rank)  # every process has data of its own
inputs = torch.randn(1000, 20, device=device)
labels = (inputs[:, :10].sum(1) > 0).long()

for _ in range(5):
    for batch in torch.randperm(1000, device=device).split(50):
        loss = nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

folder = [tempfile.mkdtemp()]
dist.broadcast_object_list(folder)
dcp.save({"model": model.state_dict(), "amplifier": amplifier}, checkpoint_id=folder[0])
amplifier.reset()
dcp.load({"model": model.state_dict(), "amplifier": amplifier}, checkpoint_id=folder[0])

summary = amplifier.summary()
if rank == 0:
    print(summary)
dist.destroy_process_group()
