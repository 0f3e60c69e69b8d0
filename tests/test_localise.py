"""Maps, boxes and the pointing game against brute force and one-liners."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medsae_ray.encoders import load_encoder
from medsae_ray.encoders.preprocessing import pad_and_resize
from medsae_ray.localise import (
    clustered_mean,
    clustered_rate,
    hits_and_iou,
    in_boxes,
    localisation_table,
    neuron_maps,
    pairings,
    pointing_table,
    readout,
    square_boxes,
    upsampled,
)
from medsae_ray.sae.architectures import ARCHITECTURES
from medsae_ray.sae.base import SAEConfig
from medsae_ray.sae.normaliser import Normaliser
from medsae_ray.sae.saelens import export_files, load_files
from medsae_ray.tables import BOXES, POINTING, TRUTH

GRID = (7, 7)


@pytest.fixture(scope="module")
def embedded():
    """Eight grey pictures through the stand-in encoder: embeddings [8, d] and shares [8, P, d]."""
    pixels = np.random.default_rng(0).integers(0, 256, (8, 224, 224), np.uint8)
    encoder = load_encoder("stand-in", None)
    return encoder.embed(pixels).embedding, encoder.shares(pixels)


def test_shares_sum_to_the_embedding(embedded):
    embedding, shares = embedded
    assert shares.shape == (8, 49, 512)
    np.testing.assert_allclose(shares.sum(axis=1), embedding, atol=1e-6)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_a_map_and_its_constant_sum_to_the_pre_activation(architecture, embedded):
    """Through the exported file, which takes raw embeddings; against x' = k (e - mu) by hand."""
    embedding, shares = embedded
    rng = np.random.default_rng(1)
    mean_shares = shares.mean(axis=0).astype(np.float64)
    mean, k = mean_shares.sum(axis=0), 1.7
    sae = ARCHITECTURES[architecture](
        SAEConfig(512, 64, l0=8), centre=torch.from_numpy(rng.normal(0, 0.01, 512))
    )
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            if name in ("b_enc", "b_gate"):
                parameter.copy_(torch.from_numpy(rng.normal(0, 0.1, 64)))
    files = export_files(sae, Normaliser(mean, k, "unit", 8), {})
    loaded = load_files(files["cfg.json"], files["sae_weights.safetensors"])
    reads = readout(loaded, mean)
    weights = {name: value.double().numpy() for name, value in sae.state_dict().items()}
    bias = weights.get("b_gate", weights.get("b_enc"))
    x = k * (embedding.astype(np.float64) - mean)
    pre = (x - weights["b_dec"]) @ weights["W_enc"] + bias
    for image in range(8):
        maps = neuron_maps(shares[image], mean_shares, reads.weight)
        assert maps.shape == (64, 49)
        np.testing.assert_allclose(maps.sum(axis=1, dtype=np.float64) + reads.constant, pre[image], atol=1e-4)


def test_upsampling_is_bilinear_between_cell_centres():
    cells = np.random.default_rng(2).normal(size=(3, 5))
    side = 30
    got = upsampled(cells.ravel(), (3, 5), side)
    for y, x in ((0, 0), (29, 29), (7, 13), (15, 2)):
        row = min(max((y + 0.5) * 3 / side - 0.5, 0), 2)
        column = min(max((x + 0.5) * 5 / side - 0.5, 0), 4)
        i, j = min(int(row), 1), min(int(column), 3)
        a, b = row - i, column - j
        by_hand = (1 - a) * ((1 - b) * cells[i, j] + b * cells[i, j + 1])
        by_hand += a * ((1 - b) * cells[i + 1, j] + b * cells[i + 1, j + 1])
        assert got[y, x] == pytest.approx(by_hand)


@given(st.lists(st.tuples(*[st.floats(0, 1)] * 4), min_size=1, max_size=4), st.integers(0, 10_000))
@settings(max_examples=40, deadline=None)
def test_hit_and_iou_are_those_of_sets(boxes, seed):
    boxes = [(min(a, c), min(b, d), max(a, c), max(b, d)) for a, b, c, d in boxes]
    side = 20
    inside = in_boxes(boxes, side)
    centres = [(i + 0.5) / side for i in range(side)]
    covered = {
        (i, j)
        for i, y in enumerate(centres)
        for j, x in enumerate(centres)
        if any(x0 <= x <= x1 and y0 <= y <= y1 for x0, y0, x1, y1 in boxes)
    }
    assert {tuple(place) for place in np.argwhere(inside).tolist()} == covered
    maps = upsampled(np.random.default_rng(seed).normal(size=(2, 49)), GRID, side)
    hit, iou = hits_and_iou(maps, inside)
    for number, of in enumerate(maps):
        region = {tuple(p) for p in np.argwhere((of > 0) & (of >= of.max() / 2)).tolist()}
        union = region | covered
        assert iou[number] == pytest.approx(len(region & covered) / len(union) if union else 0)
        assert hit[number] == (tuple(np.argwhere(of == of.max())[0].tolist()) in covered)


@given(st.integers(50, 500), st.integers(50, 500), st.data())
@settings(max_examples=25, deadline=None)
def test_a_box_lies_where_its_pixels_go(width, height, data):
    """A white box in a black image, padded and resized for the encoder, is bright where it is told."""
    x0, y0 = data.draw(st.integers(0, width - 30)), data.draw(st.integers(0, height - 30))
    x1, y1 = data.draw(st.integers(x0 + 20, width)), data.draw(st.integers(y0 + 20, height))
    pixels = np.zeros((height, width), np.uint8)
    pixels[y0:y1, x0:x1] = 255
    seen = pad_and_resize(Image.fromarray(pixels)) > 127
    rows, columns = np.flatnonzero(seen.any(axis=1)), np.flatnonzero(seen.any(axis=0))
    # Told at 1000 x 1000, whatever is stored.
    told = [x0 * 1000 / width, y0 * 1000 / height, x1 * 1000 / width, y1 * 1000 / height]
    truth = pa.Table.from_pylist(
        [{"image_id": "a", "finding": "Edema", **dict(zip(("x0", "y0", "x1", "y1"), told, strict=True))}],
        TRUTH,
    )
    box = square_boxes(truth, {"a": (width, height)}, frame=(1000, 1000), smallest=224).to_pylist()[0]
    found = [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    np.testing.assert_allclose([box[n] * 224 for n in ("x0", "y0", "x1", "y1")], found, atol=1.6)


def test_the_pointing_game_by_hand():
    boxes = pa.Table.from_pylist(
        [
            {"image_id": i, "finding": "Edema", "x0": 0.0, "y0": 0.0, "x1": 0.5, "y1": 0.5}
            for i in ("a", "b", "c")
        ],
        BOXES,
    )
    firing = {
        "a": np.array([0, 1, 2, 3], np.int32),
        "b": np.array([0, 1], np.int32),
        "c": np.array([2], np.int32),
    }
    best = ["Edema", "Fracture", "Edema", None]
    rows = pairings(boxes, {"Edema": 0}, firing, best, others=5, seed=0)
    # On c the neuron is silent; neuron 2 stands for the finding itself, 3 for nothing.
    assert [(r.image_id, r.others.tolist()) for r in rows] == [("a", [1]), ("b", [1])]
    left, right = np.zeros(49, np.float32), np.zeros(49, np.float32)
    left[8], right[40] = 1, 1
    maps = {(0, "a"): left, (1, "a"): right, (0, "b"): right, (1, "b"): left}
    table = pointing_table(rows, maps, boxes, GRID)
    assert table["hit"].to_pylist() == [True, False]
    assert table["other_hits"].to_pylist() == [0.0, 1.0]
    assert table["box_share"].to_pylist() == pytest.approx([0.25, 0.25])
    told = localisation_table(table, boxes, {"Edema": 0}, {"a": "p", "b": "q", "c": "q"}).to_pylist()[0]
    assert (told["n_boxed"], told["n"], told["n_patients"]) == (3, 2, 2)
    assert (told["hit_rate"], told["other_hit_rate"]) == (0.5, 0.5)
    assert told["above_chance"] is False
    # An image that can no longer be read has no maps and no row.
    del maps[1, "a"]
    assert pointing_table(rows, maps, boxes, GRID)["image_id"].to_pylist() == ["b"]
    empty = localisation_table(POINTING.empty_table(), boxes, {}, {}).to_pylist()[0]
    assert empty["n"] == 0
    assert empty["hit_rate"] is None
    assert empty["above_chance"] is None


def test_others_are_drawn_once_and_for_all():
    boxes = pa.Table.from_pylist(
        [{"image_id": "a", "finding": "Edema", "x0": 0.0, "y0": 0.0, "x1": 1.0, "y1": 1.0}], BOXES
    )
    firing = {"a": np.arange(100, dtype=np.int32)}
    best = ["Fracture"] * 100
    draws = [pairings(boxes, {"Edema": 7}, firing, best, others=20, seed=s)[0].others for s in (0, 0, 1)]
    assert len(set(draws[0].tolist())) == 20
    assert 7 not in draws[0]
    assert draws[0].tolist() == draws[1].tolist() != draws[2].tolist()


def test_intervals_over_patients_cover():
    """Of 95 % intervals at least 92 % hold the true rate; images taken as independent give fewer that do."""
    rng = np.random.default_rng(3)
    covered, naive = 0, 0
    for _ in range(400):
        p = rng.beta(4, 1, 40)  # mean 0.8
        patient = np.repeat(np.arange(40), 3)
        hit = rng.random(120) < p[patient]
        rate, low, high = clustered_rate(hit, patient)
        assert 0 <= low <= rate <= high <= 1
        covered += low <= 0.8 <= high
        _, low, high = clustered_rate(hit, np.arange(120))
        naive += low <= 0.8 <= high
    assert covered / 400 > 0.92
    assert naive < covered


def test_intervals_at_the_ends_and_of_means():
    assert clustered_rate([1, 1, 1, 1], [0, 0, 1, 1])[1:] == pytest.approx((2 / (2 + 1.959964**2), 1.0))
    assert clustered_rate([0], [5])[0] == 0
    values = np.array([0.2, 0.4, 0.9, 0.3])
    mean, low, high = clustered_mean(values, np.arange(4))
    half = 3.182446 * values.std(ddof=1) / 2
    assert (mean, low, high) == pytest.approx((0.45, max(0, 0.45 - half), min(1, 0.45 + half)))
    assert np.isnan(clustered_mean([0.5, 0.7], [1, 1])[1])
