"""A model small enough that an engine does hundreds of requests a second: random weights, real everything else.

Its weights are large, so that what it says depends on every token before: KV that is wrong anywhere shows.
"""

from __future__ import annotations

from pathlib import Path

VOCAB_SIZE = 512
CONTEXT_TOKEN_COUNT = 2048


def make_tiny_model(directory: Path) -> Path:
    """Writes a Llama of two layers, the same each time. Takes a few seconds, for the imports. Has no tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT_TOKEN_COUNT,
        initializer_range=0.3,
        eos_token_id=2,
        bos_token_id=1,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).to(torch.float32).save_pretrained(directory)
    return directory
