"""What the experiments say of made-up rows."""

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medsae_ray.config import ExperimentSettings
from medsae_ray.experiments import architectures, expansion, replicate
from medsae_ray.experiments.told import mean_sd, table_text
from medsae_ray.report.figures import expansion_figure, matched_figure
from medsae_ray.tables import EXPERIMENT


def row(architecture: str = "relu", seed: int = 0, **changed: Any) -> dict[str, Any]:
    """A row of `EXPERIMENT`; the entropy's interval is 0.02 to either side of it."""
    entropy = changed.get("entropy", 2.2)
    return {
        "sae": f"{architecture}-{seed}", "matched": None, "architecture": architecture,
        "normalisation": "unit", "expansion": 16, "sparsity_setting": 0.03, "l0_setting": None,
        "learning_rate": 1e-3, "seed": seed, "epoch": 10, "n_living": 90, "labels_separated": 5,
        "n_labels": 10, "valid_l0": 32.0, "valid_fve": 0.97, "fve": 0.97, "l0": 32.0, "dead": 0.5,
        "dead_train": 0.4, "entropy": entropy, "entropy_low": entropy - 0.02, "entropy_high": entropy + 0.02,
        "entropy_floor": 2.35, "best_auroc": 0.85, "share_separated": 0.5, "share_above": 0.7,
        "raw_entropy": 2.4, "raw_entropy_floor": 2.41, "entropy_labels": 14, "seconds": 1.0,
    } | changed  # fmt: skip


def seeds(architecture: str, **changed: Any) -> list[dict[str, Any]]:
    """Three seeds; a list in `changed` gives a figure to each."""
    return [
        row(architecture, seed, **{k: v[seed] if isinstance(v, list) else v for k, v in changed.items()})
        for seed in range(3)
    ]


def table(rows: list[dict[str, Any]]) -> pa.Table:
    return pa.Table.from_pylist(rows, EXPERIMENT)


# ----------------------------------------------------------------------------------------------- told


def test_a_column_is_told_as_its_mean_and_sd_over_seeds() -> None:
    rows = [{"x": 1.0, "share": 0.1}, {"x": 2.0, "share": 0.2}, {"x": 6.0, "share": 0.6}]
    assert mean_sd(rows, "x", ".2f") == f"3.00 ± {np.std([1, 2, 6], ddof=1):.2f}"
    assert mean_sd(rows, "share", ".1%") == "30.0% ± 26.5%"
    assert mean_sd(rows[:1], "x", ".1f") == "1.0"
    assert mean_sd([{"x": float("nan")}], "x", ".1f") == "nan"


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 4).flatmap(
        lambda n: st.lists(st.lists(st.text("abλ±1", min_size=1), min_size=n, max_size=n), min_size=1)
    )
)
def test_the_columns_of_a_table_stand_below_each_other(lines: list[list[str]]) -> None:
    heads = [f"head {i}" for i in range(len(lines[0]))]
    told = table_text(heads, lines).split("\n")
    assert [line.split() for line in told[1:]] == lines
    assert not any(line.endswith(" ") for line in told)
    widths = [max(len(line[i]) for line in [heads, *lines]) for i in range(len(heads))]
    for line, cells in zip(told[1:], lines, strict=True):
        assert line.startswith(cells[0])
        for i in range(1, len(cells)):
            end = sum(widths[: i + 1]) + 2 * i
            assert line[:end].endswith(f" {cells[i]}")
            assert len(line[:end]) == end


# -------------------------------------------------------------------------------------- architectures


def answer(**of: list[dict[str, Any]]) -> str:
    return architectures.answer_of({"relu": seeds("relu"), **of}, 32)


def test_fewer_dead_means_fewer_with_every_seed_at_no_less_fve() -> None:
    told = answer(
        gated=seeds("gated", dead_train=[0.1, 0.2, 0.3]),
        jumprelu=seeds("jumprelu", dead_train=[0.1, 0.1, 0.4]),
        topk=seeds("topk", dead_train=0.01, fve=0.955),
        batchtopk=seeds("batchtopk", dead_train=0.01, fve=0.962),
        matryoshka=seeds("matryoshka", dead_train=0.6),
    )
    assert (
        "ReLU-L1 leaves 40.0% of its neurons dead on the training split, at FVE 0.970 and entropy 2.200"
        in told
    )
    assert "no more than 0.01 less FVE: gated, batchtopk." in told
    assert "Fewer than 5% dead at that FVE: batchtopk." in told
    assert "Not within 10 %" not in told


@pytest.mark.parametrize(
    ("entropy", "lower", "higher", "same"),
    [
        (2.155, "topk", "none", "none"),
        (2.165, "none", "none", "topk"),
        (2.2, "none", "none", "topk"),
        (2.235, "none", "none", "topk"),
        (2.245, "none", "topk", "none"),
    ],
)
def test_entropies_differ_where_their_intervals_are_apart(
    entropy: float, lower: str, higher: str, same: str
) -> None:
    told = answer(topk=seeds("topk", dead_train=0.1, entropy=entropy))
    assert f"the entropy is lower than ReLU-L1's with {lower}, higher with {higher} (95 %" in told
    assert f"not told apart with {same}." in told


def test_the_entropy_is_told_only_of_what_has_fewer_dead() -> None:
    told = answer(topk=seeds("topk", dead_train=0.5, entropy=1.5))
    assert "less FVE: none." in told
    assert "not told apart" not in told
    assert "Fewer than 5% dead at that FVE: none." in told


@pytest.mark.parametrize(("l0", "missed"), [(35.1, False), (28.9, False), (35.3, True), (28.7, True)])
def test_what_missed_the_l0_on_test_is_not_compared(l0: float, missed: bool) -> None:
    told = answer(topk=seeds("topk", dead_train=0.0, l0=[32.0, 32.0, l0]))
    assert ("and so not compared: topk." in told) == missed
    assert ("less FVE: topk." in told) != missed
    assert ("Fewer than 5% dead at that FVE: topk." in told) != missed


def test_both_comparisons_are_tables_and_figures() -> None:
    chosen = ExperimentSettings(architectures=["relu", "topk"])
    topk = {"sparsity_setting": None, "l0_setting": 31, "dead_train": 0.125}
    rows = [
        one | {"matched": by, "fve": fve}
        for by, fve in (("path", 0.5), ("l0", 0.97), ("fve", 0.98))
        for one in seeds("relu", l0=[31.0, 32.0, 33.0]) + seeds("topk", **topk)
    ]
    at_l0, at_fve, said = architectures.text_of(rows, chosen).split("\n\n")
    assert at_l0.startswith("Architectures at L0 32 (test split, mean ± sd over 3 seeds)\narchitecture ")
    assert at_fve.startswith("The same at the FVE that relu has there\narchitecture ")
    relu, other = (line.split() for line in at_l0.split("\n")[2:])
    assert relu[:5] == ["relu", "0.03", "32.0", "±", "1.0"]
    assert other[:2] == ["topk", "31"]
    for told in ("0.9700", "12.5%", "2.200", "2.180-2.220", "2.350", "0.850", "70%"):
        assert told in other
    assert "0.9800" in at_fve
    assert "0.9700" not in at_fve
    assert said == architectures.answer_of({"relu": rows[6:9], "topk": rows[9:12]}, 32)
    for by in ("l0", "fve"):
        assert len(matched_figure(table(rows), by).axes) == 4


# ------------------------------------------------------------------------------------------ expansion


def test_an_expansion_changes_a_figure_where_its_seeds_do_not_overlap() -> None:
    large = {"entropy": [2.1, 2.12, 2.14], "fve": [0.98, 0.985, 0.99], "dead_train": [0.3, 0.5, 0.6]}
    small = {"entropy": [2.2, 2.22, 2.24], "fve": [0.95, 0.96, 0.97], "dead_train": [0.2, 0.3, 0.4]}
    rows = [
        *seeds("relu", expansion=32, **large),
        *seeds("relu", expansion=8, **small),
        *seeds("relu", expansion=16, entropy=9.0, fve=0.1, dead_train=0.9),
    ]
    told, said = expansion.text_of(rows).split("\n\n")
    assert told.startswith("Expansion at one λ (test split, mean ± sd over 3 seeds)\nexpansion ")
    lines = [" ".join(line.split()) for line in told.split("\n")[2:]]
    assert [line[: line.index("x")] for line in lines] == ["8", "16", "32"]
    assert lines[0] == "8x 32.0 ± 0.0 0.960 ± 0.010 30.0% ± 10.0% 2.220 ± 0.020 2.350 ± 0.000"
    assert said == (
        "From 8x to 32x entropy falls (from 2.220 to 2.120), FVE rises (from 0.960 to 0.985), the dead share "
        "does not change beyond the seeds (from 0.300 to 0.467). A change counts where the seeds of the two "
        "do not overlap."
    )
    assert len(expansion_figure(table(rows)).axes) == 4


def test_one_seed_says_so() -> None:
    said = expansion.text_of([row(expansion=8), row(expansion=16, fve=0.98)])
    assert "FVE rises (from 0.970 to 0.980)" in said
    assert "One seed says nothing about chance." in said


# ------------------------------------------------------------------------------------------ replicate


def test_the_deviation_is_the_mean_of_two_relative_ones() -> None:
    assert replicate.deviation(row(dead=0.30, fve=0.98)) == 0
    assert replicate.deviation(row(dead=0.33, fve=0.98)) == pytest.approx(0.05)
    assert replicate.deviation(row(dead=0.15, fve=0.49)) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("unit", "dim", "nearer"),
    [
        ((0.33, 0.98), (0.36, 0.98), "unit"),
        ((0.36, 0.98), (0.33, 0.98), "dim"),
        # 10 % of the dead share against 20 % of the FVE.
        ((0.27, 0.98), (0.30, 0.784), "unit"),
        ((0.00, 0.98), (0.30, 0.10), "dim"),
    ],
)
def test_the_nearer_convention_is_that_of_the_smaller_deviation(
    unit: tuple[float, float], dim: tuple[float, float], nearer: str
) -> None:
    rows = [row(normalisation=n, dead=d, fve=f) for n, (d, f) in (("unit", unit), ("dim", dim))]
    said = replicate.text_of(rows)
    assert f"Convention {nearer!r} lies nearer" in said
    first, second = (f"{replicate.deviation(one):.0%}" for one in rows)
    assert f"deviation of the two is {first} (unit) and {second} (dim)." in said
    assert f"Convention {nearer!r} lies nearer" in replicate.text_of(rows[::-1])


def test_the_order_of_the_paper_is_told_for_each_convention() -> None:
    rows = [row(normalisation="unit", entropy=2.3), row(normalisation="dim", entropy=2.4)]
    told, said = replicate.text_of(rows).split("\n\n")
    assert said.endswith("here it is below it under 'unit' and not below it under 'dim'.")
    lines = {line[:30].strip(): line[30:].split() for line in told.split("\n")[2:]}
    assert lines["mean entropy, living neurons"][-3:] == ["2.25", "2.300", "2.400"]
    assert lines["mean entropy, raw dimensions"][-3:] == ["2.38", "2.400", "2.400"]
    assert lines["FVE"] == ["0.98", "0.970", "0.970"]
    assert lines["dead neurons"] == ["30%", "50.0%", "50.0%"]
    assert lines["L0"] == ["-", "32.0", "32.0"]
