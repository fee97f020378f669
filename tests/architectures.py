"""Tiny random models of many architectures: for each model type, what its config says beside the shared sizes."""

from copy import deepcopy
from functools import cache
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSpeechSeq2Seq,
    PreTrainedModel,
)

# Names that a config does not know do no harm, so one set of sizes serves nearly every architecture.
TINY = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,  # wide, so that attention is sharp and a wrong key shows in the logits
    "use_cache": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,  # every sequence is generated to the end
}
WINDOW = 16  # shorter than the prompts of the tests, so that windows really slide

FULL_AND_SLIDING = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": WINDOW}
SHARED_KV = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": WINDOW,
    "vocab_size_per_layer_input": 96,
    "hidden_size_per_layer_input": 8,
}
MOE = {
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
INDEX = {"index_n_heads": 2, "index_head_dim": 16, "index_topk": 8}
LINEAR_AND_FULL = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
}
CONV_AND_FULL = {"layer_types": ["conv", "full_attention"]}
MAMBA = {
    "mamba_n_heads": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_n_groups": 1,
    "mamba_chunk_size": 8,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}
ZAMBA = {"num_hidden_layers": 4, "layers_block_type": ["mamba", "hybrid"] * 2, "attention_head_dim": 16}
STATE_SPACE = {"state_size": 8, "time_step_rank": 4}


def _each(model_types: str, overrides: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return dict.fromkeys(model_types.split(), overrides)


# Left out, as DynamicCache itself does not serve them: minimax and openai-gpt refuse it or take no cache at all.
DECODERS: dict[str, dict[str, Any]] = {
    # Full attention, several query heads to a kv head.
    **_each("apertus arcee bitnet cohere diffllama ernie4_5 gemma glm glm4 granite helium hunyuan_v1_dense llama", {}),
    **_each("nanochat nemotron olmo olmo2 phi3 qwen2 qwen3 seed_oss smollm3 stablelm", {}),
    "starcoder2": {"sliding_window": None},
    # As many kv heads as query heads.
    **_each("biogpt bloom gpt2 gpt_neox gpt_neox_japanese persimmon phi", {}),
    "ctrl": {"dff": 32},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
    "mpt": {"max_seq_len": 64},
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 32},
    "xglm": {"d_model": 32, "ffn_dim": 32},
    **_each("codegen gptj", {"rotary_dim": 4}),
    # One kv head.
    "falcon": {"multi_query": True, "new_decoder_architecture": False},
    "gpt_bigcode": {"multi_query": True},
    # Mixtures of experts.
    **_each("doge ernie4_5_moe glm4_moe granitemoe minimax_m2 mixtral olmoe phimoe qwen2_moe qwen3_moe", MOE),
    "dbrx": {
        "d_model": 32,
        "n_heads": 4,
        "n_layers": 2,
        "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
    },
    "dots1": MOE | {"n_shared_experts": 1, "first_k_dense_replace": 1},
    "jetmoe": MOE | {"kv_channels": 8, "num_layers": 2},
    # Keys and values of different widths.
    **_each("minicpm3 youtu", MLA),
    **_each("deepseek_v2 deepseek_v3 glm4_moe_lite", MOE | MLA | {"first_k_dense_replace": 1}),
    "longcat_flash": MOE
    | MLA
    | {"num_layers": 2, "ffn_hidden_size": 32, "expert_ffn_hidden_size": 16, "zero_expert_num": 1, "moe_topk": 2},
    "mimo_v2_flash": MOE | FULL_AND_SLIDING | {"head_dim": 24, "v_head_dim": 16},
    # Sliding windows and chunks, beside full attention or alone.
    **_each("cohere2 exaone4 gemma2 gemma3_text granite_swa ministral olmo3 vaultgemma", FULL_AND_SLIDING),
    **_each("afmoe gpt_oss", MOE | FULL_AND_SLIDING),
    "gemma3": {  # the text model's config lies within the model's own
        "text_config": TINY | FULL_AND_SLIDING,
        "vision_config": TINY | {"image_size": 8, "patch_size": 4},
        "mm_tokens_per_image": 4,
    },
    "llama4_text": MOE
    | {
        "layer_types": ["chunked_attention", "full_attention"],
        "attention_chunk_size": WINDOW,
        "intermediate_size_mlp": 32,
    },
    "mistral": {"sliding_window": WINDOW},
    "modernbert-decoder": FULL_AND_SLIDING | {"local_attention": WINDOW},
    "moshi": {"ffn_dim": 32, "sliding_window": WINDOW},
    # Layers that use the keys and values of other layers.
    "gemma3n_text": SHARED_KV | {"laurel_rank": 4, "altup_num_inputs": 2, "activation_sparsity_pattern": [0.0] * 4},
    "gemma4_text": SHARED_KV | {"global_head_dim": 16},
    # Sparse attention with an index, or compressed.
    **_each("deepseek_v32 glm_moe_dsa", MOE | MLA | INDEX),
    "deepseek_v4": MOE
    | INDEX
    | {
        "num_hidden_layers": 3,
        "layer_types": ["heavily_compressed_attention", "compressed_sparse_attention", "sliding_attention"],
        "compress_rates": {"heavily_compressed_attention": 8, "compressed_sparse_attention": 4},
        "sliding_window": WINDOW,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "q_lora_rank": 16,
        "o_lora_rank": 8,
        "o_groups": 2,
    },
    "minimax_m3_vl_text": MOE
    | INDEX
    | {
        "layer_types": ["minimax_m3_sparse", "full_attention"],
        "index_head_dim": 8,
        "index_block_size": 8,
        "index_topk_blocks": 2,
        "shared_intermediate_size": 16,
        "dense_intermediate_size": 32,
    },
    # Linear attention, convolutions and state spaces, beside full attention, in one layer with it, or alone.
    **_each("olmo_hybrid qwen3_5_text", LINEAR_AND_FULL),
    **_each("qwen3_5_moe_text qwen3_next", MOE | LINEAR_AND_FULL),
    **_each("bailing_hybrid kimi_linear", MOE | MLA | LINEAR_AND_FULL | {"first_k_dense_replace": 1}),
    **_each("lfm2 lfm3", CONV_AND_FULL),
    "lfm2_moe": MOE | CONV_AND_FULL | {"num_dense_layers": 1},
    "bamba": MAMBA | {"attn_layer_indices": [1]},
    "granitemoehybrid": MOE | MAMBA | {"layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    "jamba": MOE | MAMBA | {"attn_layer_offset": 1, "attn_layer_period": 2},
    "nemotron_h": MOE
    | {
        "num_hidden_layers": 3,
        "layers_block_type": ["mamba", "attention", "moe"],
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "ssm_state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
        "moe_shared_expert_intermediate_size": 16,
    },
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": WINDOW, "block_types": ["recurrent", "attention"]},
    "falcon_h1": MAMBA | {"mamba_d_ssm": 64},
    "zamba": MAMBA | ZAMBA | {"n_mamba_heads": 2, "attention_hidden_size": 64},
    "zamba2": MAMBA
    | ZAMBA
    | {"n_mamba_heads": 4, "mamba_ngroups": 1, "mamba_headdim": 16, "chunk_size": 8, "adapter_rank": 4}
    | {"num_mem_blocks": 1, "hybrid_layer_ids": [1, 3]},
    "zaya": MOE | {"num_experts_per_tok": 1, "router_hidden_size": 8},
    **_each("falcon_mamba mamba", STATE_SPACE),
    "mamba2": STATE_SPACE | {"num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8},
}

BART = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "init_std": 0.3,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
T5 = {
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "initializer_factor": 3.0,
    "decoder_start_token_id": 1,
}
ENCODER_DECODERS: dict[str, dict[str, Any]] = {
    **_each("bart m2m_100 marian", BART),
    **_each("t5 umt5", T5),
    "switch_transformers": T5 | {"num_experts": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
    "whisper": BART
    | {"num_mel_bins": 8, "max_source_positions": 40, "max_target_positions": 64}
    | {"suppress_tokens": None, "begin_suppress_tokens": None},
}


@cache
def tiny_model(model_type: str) -> PreTrainedModel:
    """The tiny random model of ``model_type``, a key of ``DECODERS`` or ``ENCODER_DECODERS``; always the same one."""
    config_class = CONFIG_MAPPING[model_type]
    settings = deepcopy(TINY | (DECODERS | ENCODER_DECODERS)[model_type])  # some configs write to the lists they get
    # What a config derives is a property, which some refuse to set.
    derived = {name for name in settings if isinstance(getattr(config_class, name, None), property)}
    config = config_class(**{name: value for name, value in settings.items() if name not in derived})
    auto_model = AutoModelForCausalLM
    if model_type in ENCODER_DECODERS:
        auto_model = AutoModelForSpeechSeq2Seq if model_type == "whisper" else AutoModelForSeq2SeqLM
    torch.manual_seed(0)
    model = auto_model.from_config(config).eval()
    assert model.num_parameters() < 100_000, f"{model_type}: a size is left at its default"
    return model
