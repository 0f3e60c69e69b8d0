"""Checking a checkpoint of the vision-language model before an engine is started on it.

An engine takes half a minute to say with a traceback what the files say at once. Nothing here imports vLLM,
and of the weights only the safetensors headers are read, besides their digest.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from medsae_ray.errors import InputError

STAND_IN = "stand-in"
"""The model's name for the small checkpoint that ships with this package."""

SPELLINGS = {"yes": ("yes", "Yes", "YES"), "no": ("no", "No", "NO")}
"""Ways in which a model may write an answer that is one token; the first of each must be one."""

_ARCHITECTURE = "Gemma3ForConditionalGeneration"
_INDEX = "model.safetensors.index.json"
_CONFIG_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
)
_NEWLINES = ("\n", "\n\n", "\n\n\n", "\n\n\n\n")
"""vLLM's Gemma 3 looks each of these up as one token."""
_GROUPS = {
    "vision tower": "vision_tower.",
    "projector": "multi_modal_projector.",
    "language model": "language_model.",
}
_ONE_MODEL = "use the weights and the config.json of one model"
_SMALL = 1 << 30
_MIB = 1 << 20


class Checkpoint(NamedTuple):
    """A checkpoint that passed."""

    path: str
    """Its folder."""
    digest: str
    """SHA-256, hexadecimal, over all files that decide a reply; see `check_checkpoint`."""
    stand_in: bool
    """Whether config.json calls it a stand-in (`medsae_stand_in`): its results need that label."""
    image_tokens: int
    """Soft tokens an image; its two markers and newlines come on top."""
    image_size: int
    """Side of the square that an image is resized to, in pixels."""
    max_positions: int
    """Longest prompt with its reply that the configuration allows, in tokens."""
    yes_ids: tuple[int, ...]
    no_ids: tuple[int, ...]
    """Tokens that are `yes` and `no` in one of the spellings of `SPELLINGS`; at least one each."""
    n_parameters: int


def check_checkpoint(model: str, download: bool) -> Checkpoint:
    """Find a Gemma 3 checkpoint with vision and check that vLLM can serve it.

    `model` is a folder, `stand-in`, or a name on the Hugging Face hub; a name is looked up in the local cache
    alone unless `download`. Tensors may be named as on the hub (`language_model.model.…`) or as transformers
    4.52 and later save them (`model.language_model.…`): vLLM reads both. Those of a quantised checkpoint (one
    with a `quantization_config`) are not compared one by one: names and shapes depend on the method.

    The digest covers configuration, tokenizer, chat template and preprocessor files and the weights. A weight
    file above 1 GiB enters with its size, its header (names, types, shapes, offsets), and its first and last
    MiB of content: enough to tell checkpoints apart, not proof against a forgery.

    Raises InputError, one sentence that names the file or key at fault, for anything that would fail in the
    engine or change what is asked of it.
    """
    folder = find_checkpoint(model, download)
    config = _read_json(folder, "config.json")
    _check_architecture(folder, config)
    _check_remote_code(folder)
    shards = _find_shards(folder)
    headers = {shard: _read_header(shard) for shard in shards}
    _find_tokenizer_files(folder)

    parsed = _parse_config(folder, config)
    _check_image_geometry(folder, parsed)
    n_parameters = _check_tensors(folder, parsed, headers, quantised="quantization_config" in config)
    yes_ids, no_ids = _check_tokenizer(folder, parsed)
    return Checkpoint(
        path=str(folder),
        digest=_digest(folder, shards),
        stand_in=bool(config.get("medsae_stand_in")),
        image_tokens=parsed.mm_tokens_per_image,
        image_size=parsed.vision_config.image_size,
        max_positions=parsed.text_config.max_position_embeddings,
        yes_ids=yes_ids,
        no_ids=no_ids,
        n_parameters=n_parameters,
    )


# Finding it


def find_checkpoint(model: str, download: bool) -> Path:
    """The folder of a checkpoint on this machine; `model` and `download` as for `check_checkpoint`.

    Raises InputError where there is none, or it cannot be fetched.
    """
    if model == STAND_IN:
        return Path(__file__).with_name("standin")
    folder = Path(model).expanduser()
    if folder.is_dir():
        return folder
    if folder.exists():
        raise InputError(f"medgemma.model {model} is a file: name the folder that holds its config.json.")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", model):
        raise InputError(f"medgemma.model {model} does not exist: name a checkpoint's folder or a hub name.")
    return _from_hub(model, download)


def _from_hub(name: str, download: bool) -> Path:
    from huggingface_hub import constants, snapshot_download
    from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

    wanted = ["*.json", "*.jinja", "*.safetensors", "tokenizer.model"]
    if download:
        # The package switches the hub off (HF_HUB_OFFLINE), which was read when this library was imported.
        constants.HF_HUB_OFFLINE = False
    try:
        return Path(snapshot_download(name, local_files_only=not download, allow_patterns=wanted))
    except GatedRepoError:
        problem, cure = "is gated", f"accept its terms at https://huggingface.co/{name}, then `hf auth login`"
    except RepositoryNotFoundError:
        problem, cure = "is not on the hub", "correct the name, or `hf auth login` if it is private"
    except LocalEntryNotFoundError:
        if not download:
            raise InputError(
                f"medgemma.model {name} is neither a folder nor in this machine's Hugging Face cache: accept "
                f"the terms at https://huggingface.co/{name} and run `hf download {name}`, or give "
                "--medgemma.download true."
            ) from None
        problem, cure = "is not in the cache and the hub is out of reach", "fetch it on a machine with access"
    except Exception as error:  # connections, quotas and disks fail in too many ways to list
        problem, cure = (
            f"cannot be downloaded ({type(error).__name__})",
            f"try `hf download {name}` by itself",
        )
    raise InputError(f"medgemma.model {name} {problem}: {cure}.")


def _find_shards(folder: Path) -> list[Path]:
    """The weight files, as vLLM chooses them: those the index names, or all safetensors there are."""
    present = sorted(folder.glob("*.safetensors"))
    if (folder / _INDEX).is_file():
        weight_map = _read_json(folder, _INDEX).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(n, str) for n in weight_map.values()):
            raise InputError(f"{folder / _INDEX} has no weight_map of names to files: download it again.")
        names = sorted(set(weight_map.values()))
        missing = [name for name in names if folder / name not in present]
        if missing:
            raise InputError(
                f"{folder} lacks {missing[0]}, {len(missing)} of the {len(names)} weight files that {_INDEX} "
                "names: download it again."
            )
        return [folder / name for name in names]
    if present:
        return present
    if pickles := sorted(path.name for kind in ("*.bin", "*.pt", "*.pth") for path in folder.glob(kind)):
        raise InputError(
            f"{folder} holds its weights as a pickle ({pickles[0]}), which could run code and is refused: "
            "use a checkpoint in safetensors."
        )
    raise InputError(f"{folder} holds no weights (*.safetensors): download the checkpoint again.")


# Its files


def _read_json(folder: Path, name: str) -> dict[str, Any]:
    file = folder / name
    try:
        content = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{folder} holds no {name}: name the folder of a whole checkpoint.") from None
    except OSError as error:
        raise InputError(f"{file} cannot be read ({type(error).__name__}): see to its permissions.") from None
    except ValueError:
        raise InputError(f"{file} is not JSON{_pointer(file)}: download it again.") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no JSON object: download it again.")
    return content


def _pointer(file: Path) -> str:
    """For a message: that the file is what `git clone` leaves without Git LFS, if so."""
    with file.open("rb") as stream:
        return " but a Git LFS pointer" if stream.read(24).startswith(b"version https://git-lfs") else ""


def _check_architecture(folder: Path, config: dict[str, Any]) -> None:
    names = config.get("architectures") or []
    if names == [_ARCHITECTURE] and isinstance(config.get("vision_config"), dict):
        return
    found = ", ".join(map(str, names)) or f"a model_type {config.get('model_type')!r}"
    if _ARCHITECTURE in names or "Gemma3ForCausalLM" in names or "text" in str(config.get("model_type")):
        found += ", a text-only model without a vision_config"
    raise InputError(
        f"{folder / 'config.json'} describes {found}, but naming and detection need a Gemma 3 with vision "
        f"({_ARCHITECTURE}): use medgemma-4b-it, medgemma-1.5-4b-it or medgemma-27b-it."
    )


def _check_remote_code(folder: Path) -> None:
    for name in ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json"):
        if (folder / name).is_file() and "auto_map" in _read_json(folder, name):
            raise InputError(
                f"{folder / name} has an auto_map, which asks to run code of the checkpoint's own: that is "
                "never done, use a checkpoint without."
            )


class _Tensor(NamedTuple):
    shape: tuple[int, ...]
    dtype: str


def _read_header(file: Path) -> dict[str, _Tensor]:
    """Names, shapes and types of a safetensors file, checked against the file's length."""
    from safetensors import SafetensorError, safe_open

    if pointer := _pointer(file):
        raise InputError(f"{file} is not weights{pointer}: run `git lfs pull`, or download it again.")
    try:
        with safe_open(file, framework="np") as opened:
            slices = ((key, opened.get_slice(key)) for key in opened.keys())  # noqa: SIM118 (no mapping)
            return {key: _Tensor(tuple(told.get_shape()), told.get_dtype()) for key, told in slices}
    except OSError as error:
        raise InputError(f"{file} cannot be read ({type(error).__name__}): see to its permissions.") from None
    except SafetensorError:
        size = file.stat().st_size
        raise InputError(
            f"{file} is truncated or damaged ({size:,} bytes do not fit its header): download it again."
        ) from None


# Configuration and weights


def _parse_config(folder: Path, config: dict[str, Any]) -> Any:
    """transformers' own Gemma3Config, which fills in what a hub config leaves to the defaults."""
    from transformers import Gemma3Config

    try:
        return Gemma3Config.from_dict(config)
    except Exception as error:  # transformers checks its fields with errors of many kinds
        reason = str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__
        raise InputError(f"{folder / 'config.json'} is not a Gemma 3's ({reason}): correct it.") from None


def _check_image_geometry(folder: Path, config: Any) -> None:
    vision, file = config.vision_config, folder / "config.json"
    size, patch, tokens = vision.image_size, vision.patch_size, config.mm_tokens_per_image
    grid, side = size // patch, math.isqrt(tokens)
    if size % patch or side * side != tokens or grid % max(side, 1):
        raise InputError(
            f"{file}: an image_size of {size} in patches of {patch} is a grid of {size / patch:g} x "
            f"{size / patch:g}, which cannot be pooled to mm_tokens_per_image {tokens}: correct the three."
        )
    found = False
    for name in ("preprocessor_config.json", "processor_config.json"):
        settings = _read_json(folder, name) if (folder / name).is_file() else {}
        length = settings.get("image_seq_length")
        if length is None and name == "processor_config.json":
            length = 256  # transformers' default, where the file says nothing
        if length not in (None, tokens):
            raise InputError(
                f"{folder / name}: image_seq_length is {length}, but config.json has mm_tokens_per_image "
                f"{tokens}: make them equal."
            )
        if name == "processor_config.json":
            settings = settings.get("image_processor") or {}
        if not settings:
            continue
        found = True
        kind = settings.get("image_processor_type")
        if not str(kind).startswith("Gemma3ImageProcessor"):
            raise InputError(
                f"{folder / name}: image_processor_type is {kind!r}, not Gemma3ImageProcessor: use the file "
                "that came with the weights."
            )
        given = settings.get("size") or {"height": 224, "width": 224}  # transformers' default
        if given != {"height": size, "width": size}:
            raise InputError(
                f"{folder / name}: size is {json.dumps(given)}, but config.json has vision_config.image_size "
                f"{size}: make them equal."
            )
    if not found:
        raise InputError(f"{folder} holds no preprocessor_config.json: download the whole checkpoint.")


def _check_tensors(
    folder: Path, config: Any, headers: dict[Path, dict[str, _Tensor]], quantised: bool
) -> int:
    """Compare names and shapes with those of an empty model of this configuration; count parameters."""
    import torch
    from transformers import Gemma3ForConditionalGeneration

    found: dict[str, tuple[Path, str, _Tensor]] = {}
    for file, tensors in headers.items():
        for key, tensor in tensors.items():
            found[_engine_name(key)] = (file, key, tensor)
    try:
        with torch.device("meta"):
            model = Gemma3ForConditionalGeneration(config)
    except Exception as error:  # a config whose fields do not fit each other
        raise InputError(
            f"{folder / 'config.json'} describes no Gemma 3 that can be built ({error})."
        ) from None
    # transformers 5 has no vision_model level in memory, while the hub and vLLM do.
    wanted = {
        _engine_name(key.replace("vision_tower.", "vision_tower.vision_model.")): tuple(tensor.shape)
        for key, tensor in model.state_dict().items()
    }
    # Tied weights are stored once: vLLM reads the embeddings and skips the other.
    optional = {"language_model.lm_head.weight"} if model.config.tie_word_embeddings else set()

    if any(k.startswith("vision_tower.") and not k.startswith("vision_tower.vision_model.") for k in found):
        raise InputError(
            f"{folder} names its vision tower as transformers 5 does (vision_tower.embeddings…), which vLLM "
            "does not read: rename those tensors to vision_tower.vision_model.… as on the hub."
        )
    for group, prefix in _GROUPS.items():
        names = {name for name in wanted.keys() - optional if name.startswith(prefix)}
        missing = names - found.keys()
        if quantised and len(missing) < len(names):
            continue
        if missing == names:
            raise InputError(f"{folder} lacks the whole {group} ({prefix}…): use the checkpoint with vision.")
        if missing:
            raise InputError(
                f"{folder} lacks {len(missing)} of the {len(names)} tensors of the {group}, the first "
                f"{min(missing)}: download it again."
            )
    if quantised:
        return sum(math.prod(shape) for shape in wanted.values())
    for name, (file, key, tensor) in sorted(found.items()):
        if name not in wanted:
            if _is_unread(name):
                continue
            raise InputError(
                f"{file} holds {key}, which a Gemma 3 of this config.json does not have: {_ONE_MODEL}."
            )
        if tensor.shape != wanted[name]:
            raise InputError(
                f"{file}: {key} has shape {list(tensor.shape)}, but config.json asks for "
                f"{list(wanted[name])}: {_ONE_MODEL}."
            )
        if tensor.dtype not in ("BF16", "F16", "F32"):
            raise InputError(
                f"{file}: {key} is stored as {tensor.dtype}, but config.json has no quantization_config: use "
                "a checkpoint in bfloat16."
            )
    return sum(math.prod(shape) for name, shape in wanted.items() if name not in optional)


def _engine_name(key: str) -> str:
    """The name under which vLLM looks for a stored tensor: the hub's."""
    for stored, engine in (
        ("model.language_model.", "language_model.model."),
        ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."),
        ("lm_head.", "language_model.lm_head."),
    ):
        if key.startswith(stored):
            return engine + key.removeprefix(stored)
    return key


def _is_unread(name: str) -> bool:
    """Whether vLLM drops the tensor: a pooling head that Gemma does not use, rotary tables."""
    return name.startswith("vision_tower.vision_model.head.") or ".rotary_emb." in name


# Tokenizer


def _find_tokenizer_files(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            raise InputError(f"{folder} holds no {name}: download the tokenizer's files as well.")
        _read_json(folder, name)
    if not any(
        (folder / name).is_file() for name in ("chat_template.jinja", "chat_template.json")
    ) and "chat_template" not in _read_json(folder, "tokenizer_config.json"):
        raise InputError(
            f"{folder} holds no chat template (chat_template.jinja, or a key of tokenizer_config.json): use "
            "an instruction-tuned checkpoint (-it)."
        )


def _check_tokenizer(folder: Path, config: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The tokens of `yes` and of `no`, after checks of what prompts are made of."""
    from transformers import AutoTokenizer

    from medsae_ray.medgemma.prompts import chat_prompt

    file = folder / "tokenizer.json"
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        vocab = tokenizer.get_vocab()
    except Exception as error:  # damaged files fail in any way inside the reader
        raise InputError(
            f"{file} cannot be read as a tokenizer ({type(error).__name__}): download it again."
        ) from None
    for name, key in (
        ("boi_token", "boi_token_index"),
        ("eoi_token", "eoi_token_index"),
        ("image_token", "image_token_index"),
    ):
        token = getattr(tokenizer, name, None)
        if token is None or token not in vocab:
            raise InputError(
                f"{folder / 'tokenizer_config.json'} names no {name} that is in tokenizer.json (Gemma's are "
                "<start_of_image>, <end_of_image> and <image_soft_token>): use the checkpoint's own files."
            )
        if vocab[token] != getattr(config, key):
            raise InputError(
                f"{file}: {token} has id {vocab[token]}, but config.json has {key} {getattr(config, key)}: "
                "use the tokenizer and the config.json of one model."
            )
    _require_tokens(file, _NEWLINES, vocab)
    if max(vocab.values()) >= config.text_config.vocab_size:
        raise InputError(
            f"{file}: ids run up to {max(vocab.values())}, but config.json has text_config.vocab_size "
            f"{config.text_config.vocab_size}: use the tokenizer and the config.json of one model."
        )
    ids = []
    for word, spellings in SPELLINGS.items():
        pieces = [tokenizer.encode(spelling, add_special_tokens=False) for spelling in spellings]
        if len(pieces[0]) != 1:
            raise InputError(
                f"{file}: {word!r} is {len(pieces[0])} tokens instead of one, so that its probability cannot "
                "be read: use Gemma's tokenizer."
            )
        ids.append(tuple(dict.fromkeys(piece[0] for piece in pieces if len(piece) == 1)))
    try:
        turn: list[dict[str, Any]] = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "?"}]
        prompt = chat_prompt(tokenizer, turn)
    except Exception as error:  # Jinja's errors and whatever the template raises
        raise InputError(
            f"{folder}: the chat template fails on a turn with images ({type(error).__name__}): use the "
            "checkpoint's own."
        ) from None
    if prompt.count(tokenizer.boi_token) != 2:
        raise InputError(
            f"{folder}: the chat template does not write {tokenizer.boi_token} for each image of a turn: use "
            "the checkpoint's own."
        )
    return ids[0], ids[1]


def _require_tokens(file: Path, tokens: Iterable[str], vocab: dict[str, int]) -> None:
    for token in tokens:
        if token not in vocab:
            raise InputError(
                f"{file} has no token {token!r}, which vLLM's Gemma 3 needs: use Gemma's tokenizer."
            )


# Digest


def _digest(folder: Path, shards: list[Path]) -> str:
    total = hashlib.sha256()
    for name in _CONFIG_FILES:
        if (folder / name).is_file():
            total.update(f"{name} {hashlib.sha256((folder / name).read_bytes()).hexdigest()}\n".encode())
    for shard in shards:
        total.update(f"{shard.name} {_digest_weights(shard)}\n".encode())
    return total.hexdigest()


def _digest_weights(file: Path) -> str:
    size = file.stat().st_size
    with file.open("rb") as stream:
        if size <= _SMALL:
            return hashlib.file_digest(stream, "sha256").hexdigest()
        part = hashlib.sha256(f"{size} ".encode())
        length = stream.read(8)
        part.update(length + stream.read(int.from_bytes(length, "little") + _MIB))
        stream.seek(-_MIB, 2)
        part.update(stream.read())
    return part.hexdigest()
