"""`flash-attn-res sample`: text from a checkpoint or a weights file, byte by byte."""

from __future__ import annotations

import argparse
import codecs
import math
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from flash_attn_res.cli import checkpoint
from flash_attn_res.cli.data import BOUNDARY
from flash_attn_res.cli.device import choose_device, set_threads
from flash_attn_res.cli.errors import CliError
from flash_attn_res.cli.model import KeyValueCache, LanguageModel, ModelConfig

CHECKPOINT_NAME = "checkpoint.safetensors"


def run_sample(arguments: argparse.Namespace) -> int:
    """Checks the options, loads the model, prints."""
    if arguments.length < 0:
        raise CliError(f"--length must be at least 0, not {arguments.length}")
    if not (math.isfinite(arguments.temperature) and arguments.temperature >= 0):
        raise CliError(f"--temperature must be at least 0 and finite, not {arguments.temperature}")
    if arguments.top_k < 0:
        raise CliError(f"--top-k must be at least 0, not {arguments.top_k}")
    if not 0 <= arguments.seed < 2**63:
        raise CliError(f"--seed must be at least 0 and below 2^63, not {arguments.seed}")
    device = choose_device(arguments.device)
    set_threads(arguments.threads)
    model = load_model(Path(arguments.path), arguments.variant).to(device)

    prompt = arguments.prompt.encode("utf-8", "surrogateescape")
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    sys.stdout.write(arguments.prompt)
    for byte in generate(
        model,
        prompt,
        length=arguments.length,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        seed=arguments.seed,
    ):
        # A boundary between two files shows as an empty line.
        sys.stdout.write(decoder.decode(b"\n\n" if bytes([byte]) == BOUNDARY else bytes([byte])))
        sys.stdout.flush()
    sys.stdout.write(decoder.decode(b"", final=True) + "\n")
    sys.stdout.flush()
    return 0


def load_model(path: Path, variant: str | None = None) -> LanguageModel:
    """The model of a weights file, or one variant of a checkpoint or of a run's folder."""
    if path.is_dir():
        path = path / CHECKPOINT_NAME
    kind, tensors, state = checkpoint.read(path)
    if kind == checkpoint.CHECKPOINT:
        configs = state["models"]
        chosen = variant or ("block" if "block" in configs else next(iter(configs)))
        if chosen not in configs:
            raise CliError(f"--variant {chosen}: {path} holds {', '.join(configs)}")
        values = configs[chosen]
        tensors = checkpoint.select(tensors, f"{chosen}/model/")
    else:
        values = state["model"]
        if variant is not None and variant != values["variant"]:
            raise CliError(f"--variant {variant}: {path} holds {values['variant']}")
    model = LanguageModel(ModelConfig.from_dict(values))
    model.load_state_dict(tensors)
    return model.eval()


@torch.inference_mode()
def generate(
    model: LanguageModel,
    prompt: bytes,
    *,
    length: int,
    temperature: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> Iterator[int]:
    """Yields `length` bytes that continue the prompt, the same ones for the same seed.

    Draws are made on the CPU in float32, so that the seed means the same on every device.
    """
    device = model.embedding.device
    generator = torch.Generator().manual_seed(seed)
    cache = KeyValueCache(window=model.config.seq_len)
    tokens = list((BOUNDARY + prompt)[-model.config.seq_len :])
    for _ in range(length):
        inputs = torch.tensor([tokens], device=device)  # [1, T]
        logits = model(inputs, cache=cache)[0, -1].float().cpu()  # [256]
        if temperature == 0:
            byte = int(logits.argmax())
        else:
            logits = logits / temperature
            if top_k:
                lowest = logits.topk(min(top_k, len(logits))).values[-1]
                logits = logits.masked_fill(logits < lowest, -math.inf)
            byte = int(torch.multinomial(logits.softmax(-1), 1, generator=generator))
        yield byte
        tokens = [byte]
