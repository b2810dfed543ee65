"""How far new cells are from those of before: each number where it is known by hand, and beside what chance gives."""

import numpy as np
import pytest

from bmfm_pipeline.config.promotion import DriftLimits
from bmfm_pipeline.evaluation.drift import (
    CellsOfASide,
    embedding_distance,
    gene_coverage,
    label_mix,
    library_size,
    measure_drift,
)

LIMITS = DriftLimits(cells=200, permutations=99)


def test_gene_coverage_is_a_part_of_that_in_training():
    assert gene_coverage(0.8, 0.4, 0.9).value == 0.5 and gene_coverage(0.8, 0.4, 0.9).drifted
    assert not gene_coverage(0.8, 0.79, 0.9).drifted
    assert not gene_coverage(0.8, 1.0, 0.9).drifted


def test_library_size_is_the_log_ratio_of_medians_in_both_directions():
    before = np.random.default_rng(0).lognormal(7, 0.3, 400)
    for factor, drifted in ((2.0, True), (0.5, True), (1.1, False)):
        found = library_size(before, before * factor, 0.5)
        assert found.value == pytest.approx(np.log2(factor)) and found.drifted is drifted


def test_label_mix_is_half_the_sum_of_differences_and_names_the_largest():
    found = label_mix(np.repeat(["a", "b"], [60, 40]), np.repeat(["a", "b", "new"], [30, 40, 30]), 0.15)
    assert found.value == pytest.approx(0.3) and found.drifted
    assert "a 60 -> 30 %, new 0 -> 30 %" in found.sentence
    same = label_mix(np.repeat(["a", "b"], [60, 40]), np.repeat(["b", "a"], [40, 60]), 0.15)
    assert same.value == 0 and not same.drifted


def test_a_label_mix_of_few_cells_must_exceed_chance_too():
    before, few = np.repeat(list("abcdefghij"), 40), np.array(list("abcdefgabc" * 2))
    found = label_mix(before, few, 0.15)
    assert found.value > 0.15 and found.value <= found.chance and not found.drifted


def test_energy_distance_is_that_of_its_definition():
    generator = np.random.default_rng(1)
    a, b = generator.normal(size=(30, 4)), generator.normal(size=(25, 4)) + 1
    between = np.mean([np.linalg.norm(x - y) for x in a for y in b])
    within = [
        np.mean([np.linalg.norm(side[i] - side[j]) for i in range(len(side)) for j in range(len(side)) if i != j])
        for side in (a, b)
    ]
    found = embedding_distance(a, b, LIMITS)
    assert found.value == pytest.approx((2 * between - sum(within)) / (2 * between))
    assert found.drifted and found.chance < found.value


def test_cells_of_the_same_kind_are_near_and_the_same_seed_gives_the_same_numbers():
    generator = np.random.default_rng(2)
    a, b = generator.normal(size=(500, 8)), generator.normal(size=(400, 8))
    found = embedding_distance(a, b, LIMITS, seed=5)
    assert found.value < 0.01 and not found.drifted
    assert found == embedding_distance(a, b, LIMITS, seed=5)


def test_what_is_not_known_of_a_side_is_not_measured():
    side = CellsOfASide(labels=np.array(["a", "b"]), totals=np.array([3.0, 4.0]), coverage=0.9)
    assert [one.name for one in measure_drift(side, side, LIMITS)] == ["gene_coverage", "library_size", "label_mix"]
    assert measure_drift(CellsOfASide(), side, LIMITS) == []
