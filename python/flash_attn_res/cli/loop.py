"""What a training loop is made of: a step, a validation, the learning rate of a step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flash_attn_res.cli.device import synchronize
from flash_attn_res.cli.model import LanguageModel, loss_of, parameter_groups

WEIGHT_DECAY = 0.1
BETAS = (0.9, 0.95)
GRADIENT_CLIP = 1.0
FINAL_LR_SHARE = 0.1  # the cosine ends at this share of the peak


def make_optimizer(model: LanguageModel) -> torch.optim.Optimizer:
    """AdamW in its fused form, which CPU and CUDA both have."""
    groups = parameter_groups(model, WEIGHT_DECAY)
    return torch.optim.AdamW(groups, lr=0.0, betas=BETAS, fused=True)


def learning_rate(step: int, *, peak: float, steps: int, warmup: int) -> float:
    """Linear rise over `warmup` steps, then half a cosine down to a tenth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    cosine = (1 + math.cos(math.pi * min(1.0, progress))) / 2
    return peak * (FINAL_LR_SHARE + (1 - FINAL_LR_SHARE) * cosine)


def training_step(
    model: LanguageModel,
    optimizer: torch.optim.Optimizer,
    inputs: Tensor,  # [B, T] int64
    targets: Tensor,  # [B, T] int64
    lr: float,
) -> float:
    """Forward, backward, clipping and update; the loss before the update, in nats a byte."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    loss = loss_of(model(inputs), targets)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
    optimizer.step()
    value = loss.item()
    synchronize(inputs.device)
    return value


@torch.no_grad()
def evaluate(model: LanguageModel, batches: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Mean loss over all bytes of the batches, in nats a byte."""
    device = model.embedding.device
    total, count = 0.0, 0
    for inputs, targets in batches:
        loss = loss_of(model(inputs.to(device)), targets.to(device))
        total += loss.item() * targets.numel()
        count += targets.numel()
    return total / count
