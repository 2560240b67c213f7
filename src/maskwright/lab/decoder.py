"""A small causal language model of the Llama form, so that whatever works on a packaged model works on it unchanged."""

from __future__ import annotations

from typing import Any

import torch

from maskwright.lab.models import seeded


def llama(
    vocabulary: int, *, layers: int = 3, width: int = 128, heads: int = 4, kv_heads: int = 2, hidden: int = 256,
    context: int = 1024, seed: int = 0,
) -> Any:  # fmt: skip
    """An untrained LlamaForCausalLM: rotary positions, grouped key heads, gated MLP, embedding tied to the head.

    `model(ids (batch, length)).logits` is (batch, length, vocabulary). Its attention is transformers' own interface,
    so masks and caches of the attention place work on it. Raises ValueError for sizes that do not divide.
    """
    import transformers

    if width % heads or heads % kv_heads:
        raise ValueError(f"width {width}, {heads} heads and {kv_heads} key heads do not divide")
    config = transformers.LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, max_position_embeddings=context,
        tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None, attention_dropout=0.0,
        initializer_range=width**-0.5 / 2, attention_bias=True,
    )  # fmt: skip
    with seeded(seed):
        model = transformers.LlamaForCausalLM(config)
    _look_back(model)
    return model.eval()


@torch.no_grad()
def _look_back(model: Any, sharpness: float = 3.0) -> None:
    """Begin with the first layer's head h looking h + 1 places back, by its query and key biases alone.

    Heads that copy the last few tokens are what recall is built on, and finding them from a random start takes most of
    the training. With the rotary turn R(t), a key bias u and a query bias R(-d) u give u' R(d - t) u for a key t places
    back, which is greatest at t = d. `sharpness` is how far, in nats, the place d stands above its neighbours.
    """
    attention, config = model.model.layers[0].self_attn, model.config
    width, turns = attention.head_dim, model.model.rotary_emb.inv_freq[: attention.head_dim // 4]
    gain = (sharpness * width**0.5 / (1 - turns.cos()).sum()) ** 0.5
    key = attention.k_proj.bias.view(config.num_key_value_heads, 2, width // 2)
    query = attention.q_proj.bias.view(config.num_attention_heads, 2, width // 2)
    key[:, 0, : len(turns)] = gain
    for head in range(config.num_attention_heads):
        angle = (head + 1) * turns
        query[head, 0, : len(turns)], query[head, 1, : len(turns)] = gain * angle.cos(), -gain * angle.sin()
