"""What a trained model does over depth: where each site reads, and how magnitudes run.

Depth is counted in sublayers l = 1..L; site L + 1 is the final aggregation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flash_attn_res.cli.model import LanguageModel, Probe, loss_of


@dataclass(frozen=True)
class DepthProfile:
    """Means over validation bytes. A magnitude of a vector [D] is its root mean square."""

    # Probability of each source at each site: L + 1 rows; row l has as many as site l sources.
    # Source 0 is the embedding, source j block j (with one sublayer to a block: sublayer j).
    attention: list[list[float]]
    embedding: float  # magnitude of the embedding
    outputs: list[float]  # L magnitudes: what each sublayer adds
    carried: list[float]  # L magnitudes: the running sum behind each sublayer
    gradients: list[float]  # L magnitudes: d(loss of a sequence's bytes, summed) / d(output)


def depth_profile(model: LanguageModel, batches: Sequence[tuple[Tensor, Tensor]]) -> DepthProfile:
    """Runs the batches forward and backward and records what the figures show."""
    device = model.embedding.device
    attention: list[Tensor] = []
    rows: list[Tensor] = []  # a batch each: 1 + L + L + L magnitudes
    for inputs, targets in batches:
        probe = Probe()
        loss = loss_of(model(inputs.to(device), probe=probe), targets.to(device))
        gradients = torch.autograd.grad(loss * targets.numel(), probe.outputs)
        assert probe.embedding is not None
        with torch.no_grad():
            rows.append(
                torch.stack(
                    [_magnitude(probe.embedding)]
                    + [_magnitude(output) for output in probe.outputs]
                    + [_magnitude(total) for total in _running_sums(model, probe)]
                    + [_magnitude(gradient) for gradient in gradients]
                )
            )
            means = [p.double().flatten(0, -2).mean(0) for p in probe.probabilities]
            attention = (
                [a + m for a, m in zip(attention, means, strict=True)] if attention else means
            )
    mean = torch.stack(rows).mean(0).tolist()
    depth = model.config.sublayers
    return DepthProfile(
        attention=[(site / len(batches)).tolist() for site in attention],
        embedding=mean[0],
        outputs=mean[1 : 1 + depth],
        carried=mean[1 + depth : 1 + 2 * depth],
        gradients=mean[1 + 2 * depth :],
    )


def _running_sums(model: LanguageModel, probe: Probe) -> list[Tensor]:
    """The sum that each sublayer's output joins: the whole stream, or its block's partial sum."""
    config = model.config
    block_size = {"plain": config.sublayers, "full": 1}.get(config.variant, config.block_size)
    total = probe.embedding if config.variant == "plain" else None
    sums = []
    for index, output in enumerate(probe.outputs):
        starts_block = config.variant != "plain" and index % block_size == 0
        total = output if starts_block or total is None else total + output
        sums.append(total)
    return sums


def _magnitude(x: Tensor) -> Tensor:
    """Mean over tokens of the root mean square over the width; x [..., D]."""
    return x.double().square().mean(-1).sqrt().mean()
