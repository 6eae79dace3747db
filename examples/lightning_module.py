"""Lightning: a callback amplifies before the trainer clips; its checkpoints bring it back.

python examples/lightning_module.py
"""

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from gradamp_fast import Schedule
from gradamp_fast.integrations.lightning import GradientAmplification


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 2))

    def training_step(self, batch):
        inputs, labels = batch
        return nn.functional.cross_entropy(self.net(inputs), labels)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


L.seed_everything(0)
inputs = torch.randn(800, 20)
labels = (inputs[:, :10].sum(1) > 0).long()

amplification = GradientAmplification(
    min_steps=20, refresh=20, schedule=Schedule([(0, 3)], unit="epoch")
)
trainer = L.Trainer(
    max_epochs=4,
    gradient_clip_val=1.0,
    callbacks=[amplification],
    logger=False,
    enable_checkpointing=False,
    enable_progress_bar=False,
)
trainer.fit(Classifier(), DataLoader(TensorDataset(inputs, labels), batch_size=32, shuffle=True))

print(amplification.amplifier.summary())
