"""Puts Attention Residuals into a Hugging Face Llama, trained or fresh.

    model = AutoModelForCausalLM.from_pretrained(...)
    add_attn_res(model, block_size=8)

With the queries at zero the patched model gives the logits that it gave before, up to eps: training
goes on from there. Caches and generate() work as ever. For recomputation use ``checkpoint=True``
instead of gradient_checkpointing_enable(): a stream cannot be read twice.
"""

from __future__ import annotations

from functools import partial

from flash_attn_res import BlockAttnRes


def add_attn_res(model, block_size: int = 8, *, checkpoint: bool = False) -> None:
    llama, eps = model.model, model.config.rms_norm_eps
    llama.attn_res = BlockAttnRes(
        2 * len(llama.layers),  # attention and MLP count separately
        model.config.hidden_size,
        block_size,
        device=model.device,
        dtype=model.dtype,
    )
    running = []  # the stream of the forward pass that runs

    def layer_forward(layer, hidden_states, **options):
        if layer is llama.layers[0]:
            running[:] = [llama.attn_res.start(hidden_states)]

        def attention(x):
            return layer.self_attn(hidden_states=x, **options)[0]

        for norm, sublayer in (
            (layer.input_layernorm, attention),
            (layer.post_attention_layernorm, layer.mlp),
        ):
            running[0].sublayer(sublayer, norm.weight, eps, checkpoint=checkpoint)
        return hidden_states  # passed on, not read: the stream holds what counts

    for layer in llama.layers:
        layer.forward = partial(layer_forward, layer)
    llama.norm.forward = lambda _: running.pop().finish(llama.norm.weight, eps)
