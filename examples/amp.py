"""Mixed precision, accumulation, clipping, a moving average of the weights, and a resumed run.

python examples/amp.py
"""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import gradamp_fast

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.bfloat16
MICRO_BATCHES = 4


class Run:
    """All that a checkpoint has to hold."""

    def __init__(self):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU())
        self.model = nn.Sequential(net, nn.Linear(64, 2)).to(DEVICE)
        self.ema = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.99))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        # Clips after amplifying, in the same pass.
        self.amplifier = gradamp_fast.Amplifier(self.model, max_norm=1.0, min_steps=5, refresh=5)
        self.scaler = gradamp_fast.GradScaler(self.amplifier, DEVICE)

    def train(self, updates):
        for update in updates:
            self.optimizer.zero_grad()
            for micro in range(MICRO_BATCHES):
                generator = torch.Generator().manual_seed(update * MICRO_BATCHES + micro)
                inputs = torch.randn(50, 20, generator=generator).to(DEVICE)
                labels = (inputs[:, :10].sum(1) > 0).long()
                with torch.autocast(DEVICE, DTYPE):
                    loss = nn.functional.cross_entropy(self.model(inputs), labels)
                self.scaler.scale(loss / MICRO_BATCHES).backward()
            self.scaler.step(self.optimizer)  # unscales, amplifies and clips: once an update
            self.scaler.update()
            self.ema.update_parameters(self.model)

    def state_dict(self):
        return {name: part.state_dict() for name, part in vars(self).items()}

    def load_state_dict(self, state):
        for name, part in vars(self).items():
            part.load_state_dict(state[name])


whole, first, resumed = Run(), Run(), Run()
whole.train(range(40))
first.train(range(20))
torch.save(first.state_dict(), "checkpoint.pt")
resumed.load_state_dict(torch.load("checkpoint.pt", weights_only=True))
resumed.train(range(20, 40))
for mine, theirs in zip(resumed.ema.parameters(), whole.ema.parameters(), strict=True):
    assert torch.equal(mine, theirs), "a resumed run goes on bit for bit"
print(resumed.amplifier.summary())
