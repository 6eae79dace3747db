"""A small transformer under AdamW, at a learning rate that is 100 times too low.

The amplifier multiplies AdamW's updates, layer by layer, while their gradients agree.

python examples/adamw.py
"""

import torch
from torch import nn

import gradamp_fast

device = "cuda" if torch.cuda.is_available() else "cpu"
verse = "the cat sat on the mat and saw a rat; the rat ran to the hat, and the cat ran at the rat. "
letters = sorted(set(verse))
text = torch.tensor([letters.index(letter) for letter in verse * 40], device=device)
LENGTH, WIDTH, RATE = 24, 32, 3e-5


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.letter = nn.Embedding(len(letters), WIDTH)
        self.place = nn.Embedding(LENGTH, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, dropout=0.0, batch_first=True)
        self.blocks = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, len(letters))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, device=x.device)
        places = self.place(torch.arange(LENGTH, device=x.device))
        return self.head(self.blocks(self.letter(x) + places, mask))


def train(grow: bool) -> list[float]:
    """The loss after every hundred steps."""
    torch.manual_seed(0)
    model, losses = Transformer().to(device), []
    optimizer = gradamp_fast.optim.AdamW(model.parameters(), RATE)
    amplifier = gradamp_fast.Amplifier(model, grow=True)
    if grow:
        amplifier.attach(optimizer)
    for step in range(1, 501):
        begin = torch.randint(len(text) - LENGTH - 1, (16, 1), device=device)
        piece = text[begin + torch.arange(LENGTH + 1, device=device)]
        loss = nn.functional.cross_entropy(model(piece[:, :-1]).mT, piece[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0:
            losses.append(loss.item())
    if grow:
        print(amplifier.summary())
    return losses


for name, losses in (("growing", train(grow=True)), ("plain", train(grow=False))):
    print(f"{name:<8} loss {', '.join(f'{loss:.2f}' for loss in losses)}")
