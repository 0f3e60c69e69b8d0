"""Train the stand-in encoder: images of phantoms against their report sentences, as MedCLIP was trained.

    python standins/train_encoder.py            # writes medsae_ray/encoders/standin_encoder.safetensors

A symmetric contrastive loss (InfoNCE) between the embeddings of images and of reports; reports of studies
with the same set of findings count as each other's. The text tower is a bag of words and is thrown away.
About 20 minutes on 2 CPU cores (180 images/s). At the end, prints how well each finding can be read from
fresh phantoms.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn
from torch.nn import functional as F

from medsae_ray.encoders.standin import WEIGHTS, StandInEncoder
from medsae_ray.labels import LABELS
from medsae_ray.radiographs.phantom import PHANTOM_VERSION, sample_images

CHUNK = 1_000
"""Patients a task; they have about 1.25 images each, of which as many as patients are taken."""


class TextTower(nn.Module):
    """Mean of word vectors, one hidden layer."""

    def __init__(self, n_words: int, dim: int = 512) -> None:
        super().__init__()
        self.words = nn.EmbeddingBag(n_words, 128, mode="mean")
        self.project = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, dim))

    def forward(self, words: Tensor, offsets: Tensor) -> Tensor:
        return F.normalize(self.project(self.words(words, offsets)), dim=1)


def chunk(task: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, list[str]]:
    """Images [CHUNK, 112, 112] uint8 (224 halved), findings, reports of one block of patients."""
    seed, number = task
    pixels, findings, reports = sample_images(seed, 1 + number * CHUNK, CHUNK)
    halved = pixels.reshape(-1, 112, 2, 112, 2).mean((2, 4), dtype=np.float32)
    return np.rint(halved).astype(np.uint8), findings, reports


def phantoms(seed: int, images: int, workers: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels, findings and reports, kept in a temporary folder for the next run."""
    cache = Path(tempfile.gettempdir()) / f"standin-v{PHANTOM_VERSION}-{seed}-{images}.npz"
    if not cache.exists():
        tasks = [(seed, number) for number in range(-(-images // CHUNK))]
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            pixels, findings, reports = zip(*pool.map(chunk, tasks, chunksize=1), strict=True)
        np.savez(
            cache,
            pixels=np.concatenate(pixels)[:images],
            findings=np.concatenate(findings)[:images],
            reports=np.concatenate(reports)[:images],
        )
    with np.load(cache) as saved:
        return saved["pixels"], saved["findings"], saved["reports"]


def bags(reports: np.ndarray) -> tuple[list[Tensor], int]:
    """Word numbers of each report, and the size of the vocabulary."""
    split = [re.findall(r"[a-z-]+", report.lower()) for report in reports]
    number = {word: i for i, word in enumerate(sorted(set().union(*split)))}
    return [torch.tensor([number[word] for word in words]) for words in split], len(number)


def contrastive_loss(image: Tensor, text: Tensor, same: Tensor, scale: Tensor) -> Tensor:
    """Symmetric InfoNCE; `same` [B, B] marks the pairs that share a target."""
    logits = scale * image @ text.T
    target = same / same.sum(1, keepdim=True)
    return -((target * F.log_softmax(logits, 1)).sum(1) + (target * F.log_softmax(logits.T, 1)).sum(1)).mean()


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Shift the batch by up to 5 pixels and vary each image's exposure a little; x [B, 1, 112, 112]."""
    du, dv = torch.randint(-5, 6, (2,), generator=generator).tolist()
    x = F.pad(x, (5, 5, 5, 5), mode="replicate")[:, :, 5 + dv : 117 + dv, 5 + du : 117 + du]
    gain = 1 + 0.1 * torch.randn(len(x), 1, 1, 1, generator=generator)
    return x * gain + 0.1 * torch.randn(len(x), 1, 1, 1, generator=generator)


def train(encoder: StandInEncoder, args: argparse.Namespace) -> None:
    pixels, findings, reports = phantoms(args.seed, args.images, args.workers)
    words, n_words = bags(reports)
    sets = torch.from_numpy(findings @ (2.0 ** np.arange(len(LABELS)))).long()
    text_tower = TextTower(n_words)
    log_scale = nn.Parameter(torch.tensor(2.3))
    encoder.backbone.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    parameters = [*encoder.parameters(), *text_tower.parameters(), log_scale]
    optimiser = torch.optim.AdamW(parameters, lr=args.lr, weight_decay=0.02)
    steps = args.images // args.batch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, args.lr, total_steps=steps * args.epochs)
    generator = torch.Generator().manual_seed(args.seed)
    start = time.perf_counter()
    for epoch in range(args.epochs):
        encoder.train()
        order = torch.randperm(args.images, generator=generator)
        total = 0.0
        for rows in order[: steps * args.batch].view(steps, args.batch):
            x = torch.from_numpy(pixels[rows.numpy()]).unsqueeze(1).float().div_(255)
            x = augment((x - encoder.mean) / encoder.std, generator)
            with torch.autocast("cpu", torch.bfloat16):
                f = encoder.backbone(x.contiguous(memory_format=torch.channels_last))
            image = F.normalize(encoder.projection(f.float().mean((2, 3))), dim=1)
            bag = [words[row] for row in rows.tolist()]
            offsets = torch.tensor([0, *map(len, bag[:-1])]).cumsum(0)
            text = text_tower(torch.cat(bag), offsets)
            same = (sets[rows][:, None] == sets[rows]).float()
            loss = contrastive_loss(image, text, same, log_scale.exp().clamp(max=30))
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            schedule.step()
            total += loss.item()
        rate = (epoch + 1) * steps * args.batch / (time.perf_counter() - start)
        print(f"epoch {epoch + 1}/{args.epochs}  loss {total / steps:.3f}  {rate:.0f} images/s", flush=True)


def embed(encoder: StandInEncoder, pixels: np.ndarray) -> np.ndarray:
    """Unit embeddings float32 [n, 512] of uint8 [n, 112, 112], as `Encoder.embed` gives for 224 px."""
    doubled = (
        np.repeat(np.repeat(block, 2, 1), 2, 2) for block in np.array_split(pixels, len(pixels) // 100)
    )
    return np.concatenate([encoder.embed(block).embedding for block in doubled])


def evaluate(encoder: StandInEncoder, workers: int) -> None:
    """Print, per finding, the test AUROC of a linear probe and of the best raw dimension."""
    (px, x_labels, _), (pv, v_labels, _), (pt, t_labels, _) = (
        phantoms(seed, images, workers)
        for seed, images in ((1_000_013, 5000), (1_000_014, 1000), (1_000_015, 2000))
    )
    x, v, t = (embed(encoder, pixels) for pixels in (px, pv, pt))
    spectrum = np.linalg.eigvalsh(np.cov(x.T))
    print(f"effective dimension (participation ratio) {spectrum.sum() ** 2 / (spectrum**2).sum():.1f}")
    print(f"{'finding':28}{'positives':>10}{'linear probe':>14}{'best dimension':>16}")
    for i, name in enumerate(LABELS):
        probe = LogisticRegression(C=100, max_iter=2000).fit(x, x_labels[:, i]).decision_function(t)
        by_dimension = [roc_auc_score(v_labels[:, i], column) for column in v.T]
        best = int(np.argmax(np.abs(np.array(by_dimension) - 0.5)))
        raw = roc_auc_score(t_labels[:, i], t[:, best])
        print(
            f"{name:28}{int(t_labels[:, i].sum()):10}{roc_auc_score(t_labels[:, i], probe):14.3f}"
            f"{max(raw, 1 - raw):16.3f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=1_000_003, help="of the phantoms and of the training")
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--workers", type=int, default=2, help="processes that render phantoms")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parents[1] / "medsae_ray" / "encoders" / WEIGHTS
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    encoder = StandInEncoder()
    train(encoder, args)
    encoder.eval()
    tensors = {
        key: (value.half() if value.is_floating_point() else value).contiguous()
        for key, value in encoder.state_dict().items()
    }
    command = f"python standins/train_encoder.py --seed {args.seed} --images {args.images}"
    command += f" --epochs {args.epochs} --batch {args.batch} --lr {args.lr}"
    metadata = {
        "stand_in": "true",
        "phantom_version": str(PHANTOM_VERSION),
        "seed": str(args.seed),
        "training": command,
    }
    save_file(tensors, args.out, metadata)
    args.out.chmod(0o644)  # safetensors makes it private
    shipped = StandInEncoder.load(str(args.out))
    print(f"{args.out.name}: {args.out.stat().st_size / 1e6:.2f} MB, SHA-256 {shipped.weights_sha256}")
    evaluate(shipped, args.workers)


if __name__ == "__main__":
    main()
