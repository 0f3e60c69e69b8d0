"""A checkpoint laid out as google/medgemma-4b-it is on the hub, scaled down, with random weights.

The same files with the same keys: two shards and their index, hub tensor names, bfloat16, the configuration
as the hub has it (older names of the rotary settings, a sliding-window pattern instead of a list of layers),
a BPE tokenizer with byte fallback and Gemma's turn, image and newline tokens, a chat template that folds a
system turn into the user's, and both processor files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

IMAGE, BEGIN_IMAGE, END_IMAGE = "<image_soft_token>", "<start_of_image>", "<end_of_image>"
CONTROL = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
NEWLINES = ["\n" * n for n in range(1, 32)]

CHAT_TEMPLATE = """\
{{ bos_token }}
{%- set turns = messages -%}
{%- set preamble = '' -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set turns = messages[1:] -%}
    {%- if messages[0]['content'] is string -%}
        {%- set preamble = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set preamble = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
{%- endif -%}
{%- for turn in turns -%}
    {%- if (turn['role'] == 'user') == (loop.index0 % 2 == 1) -%}
        {{ raise_exception('Turns must go user, assistant, user, assistant, ...') }}
    {%- endif -%}
    {{ '<start_of_turn>' + ('model' if turn['role'] == 'assistant' else turn['role']) + '\\n' }}
    {{- preamble if loop.first else '' }}
    {%- if turn['content'] is string -%}
        {{ turn['content'] | trim }}
    {%- elif turn['content'] is iterable -%}
        {%- for part in turn['content'] -%}
            {%- if part['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif part['type'] == 'text' -%}
                {{ part['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception('Content must be a string or a list of parts') }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""

CORPUS = [
    "Does this chest radiograph show what the quoted description says? Answer with one word, yes or no.",
    "Name the radiographic finding that they share. Reply in JSON: the concept and the description.",
    '{"concept": "pleural effusion", "description": "fluid blunts the costophrenic angle"}',
    '{"concept": "no common finding", "description": "the radiographs share no finding"}',
    *["yes", "no"] * 20,
]


def write_medgemma_layout(
    folder: Path,
    seed: int = 0,
    *,
    image_size: int = 56,
    patch_size: int = 14,
    image_tokens: int = 4,
    vision_hidden: int = 64,
    vision_layers: int = 3,
    hidden: int = 96,
    layers: int = 7,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    sliding_window: int = 32,
    spread: float = 1.0,
) -> Path:
    """Write the checkpoint into `folder` and return it.

    `spread` multiplies the standard deviation of the weight matrices: the real model's logits are far from
    uniform, a freshly initialised one's are not.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = gemma_tokenizer()
    ids = tokenizer.get_vocab()
    _write(folder / "tokenizer.json", json.loads(tokenizer.to_str()))
    _write(folder / "tokenizer_config.json", _tokenizer_config(ids))
    _write(
        folder / "special_tokens_map.json",
        {f"{name}_token": f"<{name}>" for name in ("bos", "eos", "pad", "unk")}
        | {"boi_token": BEGIN_IMAGE, "eoi_token": END_IMAGE, "image_token": IMAGE},
    )
    _write(folder / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    config: dict[str, Any] = {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "boi_token_index": ids[BEGIN_IMAGE],
        "eoi_token_index": ids[END_IMAGE],
        "eos_token_id": [ids["<eos>"], ids["<end_of_turn>"]],
        "image_token_index": ids[IMAGE],
        "initializer_range": 0.02,
        "mm_tokens_per_image": image_tokens,
        "model_type": "gemma3",
        "text_config": {
            "attention_bias": False,
            "attention_dropout": 0.0,
            "attn_logit_softcapping": None,
            "cache_implementation": "hybrid",
            "final_logit_softcapping": None,
            "head_dim": head_dim,
            "hidden_activation": "gelu_pytorch_tanh",
            "hidden_size": hidden,
            "initializer_range": 0.02,
            "intermediate_size": 4 * hidden,
            "max_position_embeddings": 131072,
            "model_type": "gemma3_text",
            "num_attention_heads": heads,
            "num_hidden_layers": layers,
            "num_key_value_heads": kv_heads,
            "query_pre_attn_scalar": head_dim,
            "rms_norm_eps": 1e-06,
            "rope_local_base_freq": 10000.0,
            "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
            "rope_theta": 1000000.0,
            "sliding_window": sliding_window,
            "sliding_window_pattern": 6,
            "torch_dtype": "bfloat16",
            "use_cache": True,
            # 262,145 tokens in 262,208 rows, on the hub.
            "vocab_size": -(-len(ids) // 64) * 64,
        },
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.3",
        "vision_config": {
            "attention_dropout": 0.0,
            "hidden_act": "gelu_pytorch_tanh",
            "hidden_size": vision_hidden,
            "image_size": image_size,
            "intermediate_size": 4 * vision_hidden - 20,
            "layer_norm_eps": 1e-06,
            "model_type": "siglip_vision_model",
            "num_attention_heads": 4,
            "num_channels": 3,
            "num_hidden_layers": vision_layers,
            "patch_size": patch_size,
            "torch_dtype": "bfloat16",
            "vision_use_head": False,
        },
    }
    _write(folder / "config.json", config)
    _write(
        folder / "generation_config.json",
        {
            "bos_token_id": ids["<bos>"],
            "cache_implementation": "hybrid",
            "do_sample": True,
            "eos_token_id": config["eos_token_id"],
            "pad_token_id": ids["<pad>"],
            "top_k": 64,
            "top_p": 0.95,
            "transformers_version": "4.51.3",
        },
    )
    _write(
        folder / "preprocessor_config.json",
        {
            "do_convert_rgb": None,
            "do_normalize": True,
            "do_pan_and_scan": None,
            "do_rescale": True,
            "do_resize": True,
            "image_mean": [0.5, 0.5, 0.5],
            "image_processor_type": "Gemma3ImageProcessor",
            "image_seq_length": image_tokens,
            "image_std": [0.5, 0.5, 0.5],
            "pan_and_scan_max_num_crops": None,
            "pan_and_scan_min_crop_size": None,
            "pan_and_scan_min_ratio_to_activate": None,
            "processor_class": "Gemma3Processor",
            "resample": 2,
            "rescale_factor": 1 / 255,
            "size": {"height": image_size, "width": image_size},
        },
    )
    _write(
        folder / "processor_config.json",
        {"image_seq_length": image_tokens, "processor_class": "Gemma3Processor"},
    )
    _write_shards(folder, random_weights(config, seed, spread))
    return folder


def random_weights(config: dict[str, Any], seed: int, spread: float) -> dict[str, Tensor]:
    """Random tensors in bfloat16 under the hub's names, of the shapes that transformers gives this config."""
    with torch.device("meta"):
        model = Gemma3ForConditionalGeneration(Gemma3Config(**config))
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for key, like in model.state_dict().items():
        if key == "lm_head.weight":  # tied to the embeddings, and absent on the hub
            continue
        values = torch.randn(like.shape, generator=generator)
        if "norm" in key:
            values = 0.1 * values + (1.0 if "layernorm" in key and "vision" in key else 0.0)
        elif like.ndim == 1 or "embed_tokens" in key or "position_embedding" in key:
            values = 0.1 * values
        else:
            values *= spread / like[0].numel() ** 0.5
        weights[hub_name(key)] = values.to(torch.bfloat16)
    return weights


def hub_name(key: str) -> str:
    """The hub's name of a tensor that transformers 5 calls `key`."""
    for prefix, on_hub in (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower.vision_model."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
    ):
        if key.startswith(prefix):
            return on_hub + key.removeprefix(prefix)
    raise KeyError(key)


def gemma_tokenizer() -> Tokenizer:
    """A small BPE tokenizer whose pieces, normaliser and added tokens are built as Gemma's."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Replace(" ", "▁")
    trained.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    # The trainer's initial alphabet: every printable character, so that bytes are for the rest.
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=[chr(c) for c in range(33, 127)], show_progress=False
    )
    trained.train_from_iterator(CORPUS, trainer)
    learnt = json.loads(trained.to_str())["model"]
    pieces = sorted(learnt["vocab"], key=learnt["vocab"].get)
    order = [
        *CONTROL,
        *NEWLINES,
        *(f"<0x{byte:02X}>" for byte in range(256)),
        *pieces,
        BEGIN_IMAGE,
        END_IMAGE,
    ]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(order))}
    merges = [tuple(pair) for pair in learnt["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = trained.normalizer
    tokenizer.pre_tokenizer = trained.pre_tokenizer
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", pair="<bos> $A <bos> $B", special_tokens=[("<bos>", vocab["<bos>"])]
    )
    tokenizer.add_special_tokens([*CONTROL, BEGIN_IMAGE, END_IMAGE, IMAGE])
    tokenizer.add_tokens(NEWLINES)
    return tokenizer


def _tokenizer_config(ids: dict[str, int]) -> dict[str, Any]:
    special = [*CONTROL, BEGIN_IMAGE, END_IMAGE, IMAGE]
    shape = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {
            str(ids[token]): {"content": token, "special": token in special, **shape}
            for token in sorted([*special, *NEWLINES], key=ids.__getitem__)
        },
        "boi_token": BEGIN_IMAGE,
        "bos_token": "<bos>",
        "clean_up_tokenization_spaces": False,
        "eoi_token": END_IMAGE,
        "eos_token": "<eos>",
        "extra_special_tokens": {"boi_token": BEGIN_IMAGE, "eoi_token": END_IMAGE, "image_token": IMAGE},
        "image_token": IMAGE,
        "model_max_length": 1000000000000000019884624838656,
        "pad_token": "<pad>",
        "processor_class": "Gemma3Processor",
        "sp_model_kwargs": None,
        "spaces_between_special_tokens": False,
        "tokenizer_class": "GemmaTokenizer",
        "unk_token": "<unk>",
        "use_default_system_prompt": False,
    }


def _write_shards(folder: Path, weights: dict[str, Tensor]) -> None:
    """Two files cut in the middle of the language model, as the hub's are, and their index."""
    keys = sorted(weights)
    cut = next(n for n, key in enumerate(keys) if key.startswith("language_model.model.layers.3."))
    weight_map = {}
    for shard, part in enumerate((keys[:cut], keys[cut:]), 1):
        name = f"model-{shard:05}-of-00002.safetensors"
        save_file({key: weights[key] for key in part}, folder / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, name)
    total = sum(tensor.nbytes for tensor in weights.values())
    _write(
        folder / "model.safetensors.index.json",
        {"metadata": {"total_size": total}, "weight_map": weight_map},
    )


def _write(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
