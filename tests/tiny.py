"""Tiny random models, so that the suite needs no download."""

import functools

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCAB = 100


@functools.cache
def tiny_llama(layers=2, heads=4, kv_heads=2, head_dim=16, seed=0, attention="sdpa", initializer_range=0.3):
    """A random Llama in eval mode. Its greedy tokens vary: the weights are larger than an initialization's.

    A wide model needs smaller ones, or the last bit of any rounding decides its tokens.
    """
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=heads * head_dim,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        initializer_range=initializer_range,
        bos_token_id=1,
        eos_token_id=None,
        pad_token_id=0,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).eval()
    torch.set_rng_state(generator_state)
    return model


def prompt(batch=2, tokens=70, padding=0):
    """input_ids and attention_mask [batch, tokens], the first row left-padded by ``padding`` tokens."""
    input_ids = torch.randint(2, VOCAB, (batch, tokens))
    attention_mask = torch.ones_like(input_ids)
    input_ids[0, :padding] = 0
    attention_mask[0, :padding] = 0
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def word_tokenizer():
    """A tokenizer of the words w3 to w99, for the tiny models."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCAB)}
    words = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


def bos_tokenizer():
    """The same, but it begins a text with a BOS token and ends it with an EOS token."""
    tokenizer = word_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer
