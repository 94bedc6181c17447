"""Train a tiny character model on a text file, in plain PyTorch.

    python examples/train_tiny.py --seed 1 --optimizer muon

The last line printed is JSON with `val_loss`, in nats a character, on the text's last tenth. The
initial weights and the order of the batches come from --seed; the same options give the same loss
to the last digit.
"""

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

WIDTH, LAYERS, HEADS, CONTEXT, BATCH = 48, 2, 4, 64, 8


class Block(nn.Module):
    """Causal attention and a feed-forward network, each after a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList([nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)])
        self.query_key_value = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
        self.down = nn.Linear(4 * WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        parts = self.query_key_value(self.norms[0](x)).view(batch, length, 3, HEADS, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, WIDTH))
        return x + self.down(functional.relu(self.up(self.norms[1](x))).square())


class Model(nn.Module):
    """Characters to scores of the next character."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.characters = nn.Embedding(vocabulary, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.Sequential(*[Block() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.characters(ids) + self.places.weight[: ids.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def make_optimizers(model: Model, options: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Muon is for the matrices inside the blocks; the other parameters are left to AdamW."""
    rest, rate = list(model.parameters()), options.learning_rate
    made: list[torch.optim.Optimizer] = []
    if options.optimizer == "muon":
        matrices = [each for each in model.blocks.parameters() if each.ndim == 2]
        rest = [each for each in rest if all(each is not one for one in matrices)]
        made.append(torch.optim.Muon(matrices, lr=5 * rate, weight_decay=0.0))
    if options.optimizer == "sgd":
        return [torch.optim.SGD(rest, lr=10 * rate, momentum=options.momentum)]
    betas = (options.momentum, 0.99)
    return [*made, torch.optim.AdamW(rest, lr=rate, betas=betas, eps=options.epsilon)]


def loss_of(model: Model, text: Tensor, starts: Tensor) -> Tensor:
    """Mean loss of the windows of `text` that begin at `starts`."""
    windows = text[starts[:, None] + torch.arange(CONTEXT + 1)]
    return functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def main() -> None:
    parser = argparse.ArgumentParser(description="Train a tiny character model.")
    parser.add_argument("--text", type=Path, default=Path("README.md"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--optimizer", choices=["adamw", "sgd", "muon"], default="adamw")
    parser.add_argument("--learning-rate", type=float, default=0.01)
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--epsilon", type=float, default=1e-8)
    options = parser.parse_args()
    torch.set_num_threads(1)
    characters = options.text.read_text(encoding="utf-8")
    numbers = {each: number for number, each in enumerate(sorted(set(characters)))}
    text = torch.tensor([numbers[each] for each in characters])
    train, held_out = text[: len(text) * 9 // 10], text[len(text) * 9 // 10 :]
    torch.manual_seed(options.seed)
    model = Model(len(numbers))
    optimizers = make_optimizers(model, options)
    for step in range(options.steps):
        loss = loss_of(model, train, torch.randint(len(train) - CONTEXT, (BATCH,)))
        loss.backward()
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group.setdefault("first_lr", group["lr"])
                group["lr"] = group["first_lr"] * (1 - step / options.steps)
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 50 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
    with torch.no_grad():
        val_loss = loss_of(model, held_out, torch.arange(0, len(held_out) - CONTEXT, CONTEXT))
    print(json.dumps({"val_loss": val_loss.item()}))


if __name__ == "__main__":
    main()
