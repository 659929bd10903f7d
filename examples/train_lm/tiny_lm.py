"""A byte-level language model with Block Attention Residuals in forty lines.

    python examples/train_lm/tiny_lm.py [STEPS]

No attention, to keep it short: each sublayer sees the byte before (a shift), then mixes channels.
What matters here is the residual connection: `start`, `read`, `write`, `finish`.
"""

import pathlib
import sys
import textwrap

import torch
from torch import nn

from flash_attn_res import BlockAttnRes


class TinyLM(nn.Module):
    """Bytes [B, T] to logits [B, T, 256]."""

    def __init__(self, dim: int = 64, sublayers: int = 8, block_size: int = 4) -> None:
        super().__init__()
        self.embedding = nn.Embedding(256, dim)
        self.sublayers = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * dim, 2 * dim), nn.SiLU(), nn.Linear(2 * dim, dim))
            for _ in range(sublayers)
        )
        self.norms = nn.Parameter(torch.ones(sublayers + 1, dim))
        self.attn_res = BlockAttnRes(num_sublayers=sublayers, dim=dim, block_size=block_size)
        self.head = nn.Linear(dim, 256)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Every sublayer reads its own mixture of earlier depths, already normalised."""
        stream = self.attn_res.start(self.embedding(tokens))
        for sublayer, norm in zip(self.sublayers, self.norms[:-1], strict=True):
            x = stream.read(norm)  # [B, T, D]
            before = nn.functional.pad(x, (0, 0, 1, 0))[:, :-1]  # the byte before
            stream.write(sublayer(torch.cat((x, before), dim=-1)))
        return self.head(stream.finish(self.norms[-1]))


torch.manual_seed(0)
text = torch.frombuffer(bytearray(pathlib.Path(textwrap.__file__).read_bytes()), dtype=torch.uint8)
model = TinyLM()
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for step in range(int(sys.argv[1]) if len(sys.argv) > 1 else 200):
    starts = torch.randint(len(text) - 64, (16, 1))
    window = text[starts + torch.arange(65)].long()  # [16, 65]
    loss = nn.functional.cross_entropy(model(window[:, :-1]).transpose(1, 2), window[:, 1:])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 20 == 0:
        print(f"step {step:4}  loss {loss.item():.3f} nats per byte")
lengths = model.attn_res.queries.norm(dim=-1)
print(f"queries, zero at the start, now have lengths of up to {lengths.max().item():.2f}")
