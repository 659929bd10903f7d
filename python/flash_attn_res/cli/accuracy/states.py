"""Hidden states of a trained model at its depths: the realistic family.

From a checkpoint of `flash-attn-res train`, or of a small model that is trained here in a few
seconds: `train` with fixed options on the Python standard library's sources.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flash_attn_res import BlockAttnRes
from flash_attn_res.cli import data, loop
from flash_attn_res.cli.accuracy.families import Inputs, Size, storable
from flash_attn_res.cli.errors import CliError
from flash_attn_res.cli.model import LanguageModel, ModelConfig, Probe
from flash_attn_res.cli.sample import load_model

#: The model that is trained here: deep rather than wide, so that there are many sources.
CONFIG = ModelConfig(variant="block", layers=17, dim=64, heads=2, block_size=4, seq_len=64)
QUICK_CONFIG = ModelConfig(variant="block", layers=5, dim=64, heads=2, block_size=4, seq_len=64)
STEPS, QUICK_STEPS, BATCH, PEAK_LR = 120, 40, 4, 3e-3


@dataclass
class States:
    """The embedding and the L outputs of a model's sublayers on validation text."""

    embedding: Tensor  # [T, D]
    outputs: list[Tensor]  # L x [T, D]
    queries: Tensor  # [L + 1, D]
    key_weight: Tensor  # [L + 1, D]
    norm_weight: Tensor  # [D] of the final norm
    origin: dict[str, Any]  # where they come from, for the result file

    @property
    def most_sources(self) -> int:
        """The embedding and all outputs but the two that are partial sum and update."""
        return len(self.outputs) - 1

    def inputs(self, N: int, S: int) -> Inputs:
        """The embedding and N - 1 blocks of outputs; queries and weights are the learned ones."""
        outputs = self.outputs[:-2]
        bounds = [round(i * len(outputs) / max(1, N - 1)) for i in range(N)]
        blocks = [torch.stack(outputs[a:b]).sum(0) for a, b in itertools.pairwise(bounds)]
        last = torch.arange(S) - S  # the deepest sites have learned the most
        return Inputs(
            sources=storable(torch.stack([self.embedding, *blocks])),
            partial=storable(self.outputs[-2]),
            update=storable(self.outputs[-1]),
            queries=storable(self.queries[last]),
            key_weight=storable(self.key_weight[last]),
            norm_weight=storable(self.norm_weight),
        )

    def size(self, N: int, S: int) -> Size:
        """Of the inputs."""
        return Size(N, S, *self.embedding.shape)


def capture(model: LanguageModel, tokens: Tensor, origin: dict[str, Any]) -> States:
    """Runs tokens [B, T] through the model and keeps what its sites read."""
    residual = model.residual
    assert isinstance(residual, BlockAttnRes)
    probe = Probe()
    with torch.no_grad():
        model(tokens, probe=probe)
    assert probe.embedding is not None
    dim = model.config.dim
    key_weight = residual.key_weight
    return States(
        embedding=probe.embedding.float().reshape(-1, dim),
        outputs=[output.float().reshape(-1, dim) for output in probe.outputs],
        queries=residual.queries.detach(),
        key_weight=torch.ones_like(residual.queries) if key_weight is None else key_weight.detach(),
        norm_weight=model.final_norm.detach(),
        origin=origin,
    )


def from_checkpoint(path: Path) -> States:
    """States of the block or full variant of a run, or of a weights file."""
    model = load_model(path)
    config = model.config
    if config.variant == "plain":
        raise CliError(f"--checkpoint {path}: a plain model, which has no queries; needs block")
    if config.sublayers < 3:
        raise CliError(
            f"--checkpoint {path}: {config.sublayers} sublayers, needs at least 3 for two sources, "
            "a partial sum and an update"
        )
    corpus = data.load_corpus((), config.seq_len)
    origin = {"checkpoint": path.name, "model": config.to_dict(), "text_digest": corpus.digest}
    return capture(model, _validation(corpus, config.seq_len), origin)


def trained(seed: int, quick: bool) -> States:
    """States of a small model that is trained now; the same for the same seed and text."""
    config, steps = (QUICK_CONFIG, QUICK_STEPS) if quick else (CONFIG, STEPS)
    corpus = data.load_corpus((), config.seq_len)
    model = LanguageModel(config, seed=seed)
    optimizer = loop.make_optimizer(model)
    losses = []
    for step in range(steps):
        batch = data.training_batch(
            corpus.train, seed=seed, step=step, batch=BATCH, seq_len=config.seq_len
        )
        lr = loop.learning_rate(step, peak=PEAK_LR, steps=steps, warmup=steps // 10)
        losses.append(loop.training_step(model, optimizer, *batch, lr))
    origin = {
        "model": config.to_dict(),
        "steps": steps,
        "last_loss": round(sum(losses[-10:]) / 10, 3),
        "text_digest": corpus.digest,
    }
    return capture(model, _validation(corpus, config.seq_len), origin)


def _validation(corpus: data.Corpus, seq_len: int) -> Tensor:
    return data.validation_batches(corpus.validation, windows=4, batch=4, seq_len=seq_len)[0][0]
