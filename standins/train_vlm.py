"""Train the stand-in VLM: a tiny Gemma 3 that names findings of phantoms and answers yes or no about them.

    python standins/train_vlm.py                # writes medsae_ray/medgemma/standin/

Renders phantoms; trains the vision tower, through the projector, to classify them (image labels, and the
place of each sign by patch: both heads are thrown away); then, the tower frozen, trains the text model on
naming and detection turns in Gemma's chat format. vLLM attends the tokens of an image causally on CPUs,
Hugging Face in both directions: each step draws one of the two masks. About 55 minutes on 2 CPU cores.
`evaluate_vlm.py` measures the result.
"""

from __future__ import annotations

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.metrics import roc_auc_score
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3Processor,
    PreTrainedTokenizerFast,
)
from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil
from vlm_data import PATCHES, SIDE, Phantoms, phantoms
from vlm_text import (
    BOI,
    BOS,
    CHAT_TEMPLATE,
    END_OF_TURN,
    EOI,
    EOS,
    IMAGE,
    IMAGE_TOKENS,
    PAD,
    Panels,
    collate,
    detections,
    make_tokenizer,
    namings,
)

from medsae_ray.labels import LABELS
from medsae_ray.radiographs.phantom import FINDINGS, PHANTOM_VERSION

OUT = Path(__file__).parents[1] / "medsae_ray" / "medgemma" / "standin"
TEST_SEED = 4_000_037


class Classifier(nn.Module):
    """The vision tower and projector with two linear heads that only its training needs."""

    def __init__(self, model: Gemma3ForConditionalGeneration) -> None:
        super().__init__()
        self.tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector
        vision, text = model.config.vision_config.hidden_size, model.config.text_config.hidden_size
        self.image = nn.Linear(text, len(LABELS))
        self.patch = nn.Linear(vision, len(FINDINGS))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Logits [B, 14] of the image and [B, 64, 13] of its patches; x [B, 3, 112, 112]."""
        hidden = self.tower(x).last_hidden_state
        return self.image(self.projector(hidden)).mean(1), self.patch(hidden)


def normalised(pixels: np.ndarray) -> Tensor:
    """float32 [B, 3, 112, 112] in [-1, 1], as the image processor gives."""
    return torch.tensor(pixels).unsqueeze(1).float().div_(127.5).sub_(1).expand(-1, 3, -1, -1)


def augmented(pixels: np.ndarray, generator: torch.Generator) -> Tensor:
    """The same, the batch shifted by up to 4 pixels, each image's exposure varied a little."""
    x = normalised(pixels)[:, :1]
    du, dv = torch.randint(-4, 5, (2,), generator=generator).tolist()
    x = F.pad(x, (4, 4, 4, 4), mode="replicate")[:, :, 4 + dv : 116 + dv, 4 + du : 116 + du]
    x = x * (1 + 0.1 * torch.randn(len(x), 1, 1, 1, generator=generator))
    x = x + 0.08 * torch.randn(len(x), 1, 1, 1, generator=generator)
    return x.expand(-1, 3, -1, -1)


def optimisers_of(
    module: nn.Module, hidden: Callable[[str], bool], muon_lr: float, adam_lr: float, steps: int
) -> tuple[list[torch.optim.Optimizer], list[torch.optim.lr_scheduler.LambdaLR]]:
    """Muon for the matrices of hidden layers, AdamW for all else, each with its schedule."""
    matrices, others = [], []
    for name, parameter in module.named_parameters():
        (matrices if parameter.ndim == 2 and hidden(name) else others).append(parameter)
    optimisers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=muon_lr, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.02),
    ]

    def warm_cosine(step: int) -> float:
        return min(1, (step + 1) / 150) * (0.51 + 0.49 * math.cos(math.pi * step / steps))

    return optimisers, [torch.optim.lr_scheduler.LambdaLR(o, warm_cosine) for o in optimisers]


def train_tower(model: Gemma3ForConditionalGeneration, data: Phantoms, args: argparse.Namespace) -> None:
    classifier = Classifier(model)
    labels, where = torch.from_numpy(data.findings).float(), torch.from_numpy(data.where)
    with torch.no_grad():
        classifier.image.bias.copy_(torch.logit(labels.mean(0)))
        classifier.patch.bias.copy_(torch.logit(where[:5000].float().mean((0, 2, 3))))
    forward = torch.compile(classifier)
    steps = args.tower_images // args.tower_batch
    optimisers, schedules = optimisers_of(
        classifier, lambda name: ".layers." in name, args.tower_lr, 1e-3, steps
    )
    generator = torch.Generator().manual_seed(args.seed)
    start, total, order = time.perf_counter(), np.zeros(2), torch.empty(0, dtype=torch.long)
    for step in range(1, steps + 1):
        if len(order) < args.tower_batch:
            order = torch.randperm(len(labels), generator=generator)
        rows, order = order[: args.tower_batch], order[args.tower_batch :]
        x = augmented(data.pixels[rows.numpy()], generator)
        with torch.autocast("cpu", torch.bfloat16):
            image, patch = forward(x)
        image_loss = F.binary_cross_entropy_with_logits(image.float(), labels[rows])
        patch_loss = F.binary_cross_entropy_with_logits(
            patch.float(), where[rows].flatten(2).transpose(1, 2).float()
        )
        classifier.zero_grad()
        (image_loss + args.patch_weight * patch_loss).backward()
        nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        for stepped in (*optimisers, *schedules):
            stepped.step()
        total += image_loss.item(), patch_loss.item()
        if step % 100 == 0:
            rate = step * args.tower_batch / (time.perf_counter() - start)
            print(
                f"tower {step}/{steps}  loss {total[0] / 100:.4f} + {total[1] / 100:.4f}"
                f"  {rate:.0f} images/s",
                flush=True,
            )
            total[:] = 0
    test = phantoms(TEST_SEED, 2_000, args.workers, args.cache)
    classifier.eval()
    with torch.no_grad():
        logits = torch.cat(
            [classifier(normalised(block))[0] for block in np.array_split(test.pixels, 16)]
        ).numpy()
    for i, name in enumerate(LABELS):
        present = test.findings[:, i]
        hit, miss = (logits[present, i] > 0).mean(), (logits[~present, i] <= 0).mean()
        print(
            f"{name:28} AUROC {roc_auc_score(present, logits[:, i]):.3f}  found {hit:.3f}"
            f"  ruled out {miss:.3f}"
        )


def make_model(vocabulary: int) -> Gemma3ForConditionalGeneration:
    """A randomly initialised model of the stand-in's size."""
    text = {
        "vocab_size": vocabulary,
        "hidden_size": 192,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 6,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "max_position_embeddings": 8192,
        "layer_types": ["full_attention"] * 3,
        "sliding_window": 1024,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
        },
        "pad_token_id": PAD,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
    }
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "image_size": SIDE,
        "patch_size": SIDE // PATCHES,
        "vision_use_head": False,
    }
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        mm_tokens_per_image=IMAGE_TOKENS,
        boi_token_index=BOI,
        eoi_token_index=EOI,
        image_token_index=IMAGE,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=[EOS, END_OF_TURN],
        medsae_stand_in=True,
    )
    model = Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager")
    nn.init.normal_(
        model.model.multi_modal_projector.mm_input_projection_weight, std=vision["hidden_size"] ** -0.5
    )
    return model


def pooled_features(model: Gemma3ForConditionalGeneration, pixels: np.ndarray) -> Tensor:
    """What the projector's norm gets, [n, 16, 128]: the trained tower's patches, pooled."""
    projector = model.model.multi_modal_projector
    tower = torch.compile(model.model.vision_tower)
    blocks = []
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        for start in range(0, len(pixels), 250):
            hidden = tower(normalised(pixels[start : start + 250])).last_hidden_state
            grid = hidden.transpose(1, 2).unflatten(2, (PATCHES, PATCHES))
            blocks.append(projector.avg_pool(grid.float()).flatten(2).transpose(1, 2).bfloat16())
    return torch.cat(blocks)


class Reader(nn.Module):
    """The model behind the vision tower: pooled features and tokens to hidden states."""

    def __init__(self, model: Gemma3ForConditionalGeneration) -> None:
        super().__init__()
        self.projector, self.text = model.model.multi_modal_projector, model.model.language_model

    def forward(self, tokens: Tensor, pooled: Tensor, mask: Tensor) -> Tensor:
        """[B, L, 192]; tokens [B, L], pooled [B, images, 16, 128], mask [B or 1, 1, L, L] (added)."""
        projected = self.projector.mm_soft_emb_norm(pooled) @ self.projector.mm_input_projection_weight
        embedded = self.text.embed_tokens(tokens)
        embedded = embedded.masked_scatter((tokens == IMAGE)[..., None], projected.to(embedded.dtype))
        return self.text(
            inputs_embeds=embedded,
            attention_mask={"full_attention": mask},
            position_ids=torch.arange(tokens.shape[1])[None],
            use_cache=False,
        ).last_hidden_state


def attention_mask(tokens: Tensor, both_ways: bool) -> Tensor:
    """Causal; `both_ways`, the tokens of an image also see those that follow in the same image."""
    length = tokens.shape[1]
    visible = torch.ones(length, length, dtype=torch.bool).tril()[None]
    if both_ways:
        image = torch.where(tokens == IMAGE, (tokens == BOI).cumsum(1), -torch.arange(1, length + 1))
        visible = visible | (image[:, :, None] == image[:, None, :])
    return torch.zeros(visible.shape).masked_fill(~visible, -1e9)[:, None]


def train_text(
    model: Gemma3ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    data: Phantoms,
    args: argparse.Namespace,
    metadata: dict[str, str],
) -> None:
    pooled = pooled_features(model, data.pixels)
    reader = Reader(model)
    forward = torch.compile(reader, dynamic=True)
    embedding = model.model.language_model.embed_tokens.weight
    optimisers, schedules = optimisers_of(
        reader, lambda name: ".layers." in name, args.text_lr, 1e-3, args.text_steps
    )
    rng = np.random.default_rng(args.seed)
    panels = Panels(data.findings, rng)
    exact = tokenizer.backend_tokenizer
    noisy = Tokenizer.from_str(exact.to_str())
    noisy.model.dropout = 0.1
    start, total = time.perf_counter(), np.zeros(4)
    for step in range(1, args.text_steps + 1):
        both_ways = bool(rng.random() < 0.5)
        images = int(rng.integers(3, 13)) if rng.random() < 0.6 else 10
        reader.zero_grad()
        for kind, turns in enumerate(
            (
                list(detections(panels, args.detections)),
                list(namings(panels, images, args.namings)),
            )
        ):
            batch = collate(exact, noisy, turns, rng)
            tokens, weight = torch.from_numpy(batch.tokens), torch.from_numpy(batch.weight)
            mask = attention_mask(tokens, both_ways)
            with torch.autocast("cpu", torch.bfloat16):
                hidden = forward(tokens, pooled[torch.from_numpy(batch.images)], mask)
            at = weight[:, 1:] > 0
            logits = hidden[:, :-1][at].float() @ embedding.T
            target, weights = tokens[:, 1:][at], weight[:, 1:][at]
            losses = weights * F.cross_entropy(logits, target, reduction="none")
            (losses.sum() / len(turns) * (1.0 if kind == 0 else args.naming_weight)).backward()
            with torch.no_grad():
                right = torch.zeros(at.shape, dtype=torch.bool)
                right[at] = logits.argmax(1) == target
                first = (right | ~at | (weight[:, 1:] < 1)).all(1).float().mean()
            total[2 * kind : 2 * kind + 2] += losses.sum().item() / len(turns), first.item()
        nn.utils.clip_grad_norm_(reader.parameters(), 1.0)
        for stepped in (*optimisers, *schedules):
            stepped.step()
        if step % 50 == 0:
            total /= 50
            print(
                f"text {step}/{args.text_steps}  detection {total[0]:.3f}, right {total[1]:.3f}  "
                f"naming {total[2]:.3f}, right {total[3]:.3f}  {time.perf_counter() - start:.0f} s",
                flush=True,
            )
            total[:] = 0
        if args.save_every and step % args.save_every == 0:
            save(model, tokenizer, args.out, metadata)


def hub_key(key: str) -> str:
    """The name that a key of the model in memory has in the hub's checkpoints of Gemma 3 and MedGemma."""
    key = key.removeprefix("model.")
    key = key.replace("language_model.", "language_model.model.", 1)
    if not key.startswith("vision_tower.vision_model."):
        key = key.replace("vision_tower.", "vision_tower.vision_model.", 1)
    return key


def save(
    model: Gemma3ForConditionalGeneration,
    tokenizer: PreTrainedTokenizerFast,
    out: Path,
    metadata: dict[str, str],
) -> None:
    """Write the checkpoint as those of MedGemma are laid out, in bfloat16."""
    out.mkdir(parents=True, exist_ok=True)
    tensors = {
        hub_key(key): value.detach().bfloat16().contiguous()
        for key, value in model.state_dict().items()
        if key != "lm_head.weight"  # tied to the embedding
    }
    save_file(tensors, out / "model.safetensors", metadata)
    (out / "model.safetensors").chmod(0o644)  # safetensors makes it private
    config = model.config.to_diff_dict() | {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": "gemma3",
        "dtype": "bfloat16",
    }
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    generation = {"bos_token_id": BOS, "eos_token_id": [EOS, END_OF_TURN], "pad_token_id": PAD}
    (out / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    images = Gemma3ImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
        do_pan_and_scan=False,
    )
    images.save_pretrained(out)
    Gemma3Processor(
        images, tokenizer, chat_template=CHAT_TEMPLATE, image_seq_length=IMAGE_TOKENS
    ).save_pretrained(out)
    settings = out / "tokenizer_config.json"
    settings.write_text(settings.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=4_000_003, help="of the phantoms and of the training")
    parser.add_argument("--images", type=int, default=100_000, help="phantoms that the tower is trained on")
    parser.add_argument("--read-images", type=int, default=40_000, help="others, for the text model")
    parser.add_argument("--tower-images", type=int, default=480_000, help="images shown to the tower in all")
    parser.add_argument("--tower-batch", type=int, default=192)
    parser.add_argument("--tower-lr", type=float, default=2e-3)
    parser.add_argument("--patch-weight", type=float, default=1.0, help="of the loss on patches")
    parser.add_argument("--text-steps", type=int, default=1000)
    parser.add_argument("--detections", type=int, default=128, help="a step")
    parser.add_argument("--namings", type=int, default=16, help="panels a step")
    parser.add_argument("--naming-weight", type=float, default=0.5)
    parser.add_argument("--text-lr", type=float, default=1e-3)
    parser.add_argument("--save-every", type=int, default=0, help="steps of the text model; 0: at the end")
    parser.add_argument("--workers", type=int, default=2, help="processes that render phantoms")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cache", type=Path, default=Path(tempfile.gettempdir()) / "standin-vlm")
    parser.add_argument("--out", type=Path, default=OUT)
    args = parser.parse_args()
    recipe = [
        f"--{name.replace('_', '-')} {value}"
        for name, value in vars(args).items()
        if name not in ("save_every", "workers", "threads", "cache", "out")
    ]
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    start = time.perf_counter()
    tokenizer = make_tokenizer(1280)
    model = make_model(len(tokenizer))
    shape = f"{args.seed}-{args.images}-{args.tower_images}-{args.tower_batch}-{args.tower_lr}"
    tower_file = args.cache / f"tower-v{PHANTOM_VERSION}-{shape}-{args.patch_weight}.pt"
    if not tower_file.exists():
        train_tower(model, phantoms(args.seed, args.images, args.workers, args.cache), args)
        torch.save(model.state_dict(), tower_file)
    model.load_state_dict(torch.load(tower_file, weights_only=True))
    data = phantoms(args.seed + 1, args.read_images, args.workers, args.cache)
    metadata = {
        "format": "pt",
        "stand_in": "true",
        "phantom_version": str(PHANTOM_VERSION),
        "seed": str(args.seed),
        "training": " ".join(("python standins/train_vlm.py", *recipe)),
    }
    train_text(model, tokenizer, data, args, metadata)
    save(model, tokenizer, args.out, metadata)
    size = sum(file.stat().st_size for file in args.out.iterdir())
    print(f"{args.out.name}: {size / 1e6:.2f} MB, {(time.perf_counter() - start) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
