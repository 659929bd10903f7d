"""examples/hf_llama: a Llama before and after the patch."""

from __future__ import annotations

import pathlib
import runpy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = pathlib.Path(__file__).resolve().parents[2]
add_attn_res = runpy.run_path(str(ROOT / "examples" / "hf_llama" / "attn_res_llama.py"))[
    "add_attn_res"
]


@pytest.fixture
def model() -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=2,
        rms_norm_eps=1e-10,  # what zero queries keep, they keep up to eps
    )
    return LlamaForCausalLM(config).eval()


def with_queries(model: LlamaForCausalLM) -> LlamaForCausalLM:
    torch.nn.init.normal_(model.model.attn_res.queries)
    return model


def test_the_logits_are_those_from_before(model: LlamaForCausalLM) -> None:
    tokens = torch.randint(97, (2, 17))
    expected = model(tokens).logits
    add_attn_res(model, block_size=4)
    torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)
    changed = with_queries(model)(tokens).logits
    assert not torch.allclose(changed, expected, rtol=1e-2, atol=1e-3)


def test_every_parameter_learns_and_recomputation_changes_no_bit(model: LlamaForCausalLM) -> None:
    tokens = torch.randint(97, (2, 9))
    gradients = []
    for checkpoint in (False, True):
        add_attn_res(model, block_size=4, checkpoint=checkpoint)
        torch.manual_seed(3)
        with_queries(model).train()
        model.zero_grad()
        model(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert "model.attn_res.queries" in gradients[0]
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name
        assert gradient.abs().max() > 0 or "attn_res" in name


def test_generation_with_a_cache_is_generation_without(model: LlamaForCausalLM) -> None:
    add_attn_res(model, block_size=4)
    with_queries(model)
    prompt = torch.randint(97, (1, 6))
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    cached = model.generate(prompt, use_cache=True, **options)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))
    assert cached.shape == (1, 14)
