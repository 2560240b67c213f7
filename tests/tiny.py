"""A Llama of a few thousand weights in real format, with a tokenizer: a folder like any other."""

from pathlib import Path

import torch

from maskwright.lab.text import topics_split


def tiny_llama(folder: Path, dtype: torch.dtype = torch.bfloat16, **config) -> Path:
    """Write it and give the folder back."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel(unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.train_from_iterator(
        [topics_split()[0]], trainers.WordLevelTrainer(vocab_size=300, special_tokens=["<unk>", "</s>"])
    )
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="</s>").save_pretrained(folder)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        told = LlamaConfig(
            vocab_size=300, hidden_size=32, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, bos_token_id=1, eos_token_id=1, pad_token_id=1, tie_word_embeddings=True, **config,
        )  # fmt: skip
        LlamaForCausalLM(told).to(dtype).save_pretrained(folder)
    return folder
