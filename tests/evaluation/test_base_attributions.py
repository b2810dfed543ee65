"""Attributions of single bases: even parts of pieces, and bases exchanged."""

import numpy as np

from bmfm_pipeline.evaluation.attributions.bases import BaseScores, check_exchanged, spread, top_sequences
from bmfm_pipeline.evaluation.pages.logos import MOST_LINES, PER_LINE, drawn_part, logo


def test_a_piece_gives_its_letters_even_parts():
    assert spread(np.array([3.0, -1.0]), np.array([3, 2])).tolist() == [1, 1, 1, -0.5, -0.5]


def test_exchanging_what_matters_lowers_the_score_more_than_exchanging_anything():
    letters = "ACGTACGTAC" * 4
    scores = np.zeros(40)
    scores[:4] = 1.0  # the score is how many of the first four letters are as they were

    def score(label, kind, sequences):
        return np.array([sum(a == b for a, b in zip(one[:4], letters[:4], strict=True)) for one in sequences])

    found = check_exchanged([BaseScores("s", "y", "a", "a", 4.0, letters, scores)], score, 0)
    assert found["top"] == 4 and found["random"] < 4 and found["above"] == 1
    assert check_exchanged([BaseScores("s", "y", "a", "a", 4.0, "ACGT", scores[:4])], score, 0) is None


def test_sequences_that_are_predicted_as_their_class_are_drawn_first():
    made = [
        BaseScores(f"s{number}", "y", "a", predicted, score, "ACGT", np.ones(4))
        for number, (predicted, score) in enumerate([("b", 9.0), ("a", 1.0), ("a", 3.0), ("a", 2.0)])
    ]
    assert [one["name"] for one in top_sequences(made)["y"]] == ["s2", "s3", "s1"]


def test_of_a_long_sequence_the_part_around_its_largest_score_is_drawn():
    scores = np.zeros(5000)
    scores[3000] = -2
    part = drawn_part(scores)
    assert part.stop - part.start == PER_LINE * MOST_LINES and part.start < 3000 < part.stop


def test_letters_are_as_tall_as_their_scores(tmp_path):
    changes = np.array([[np.nan, 1, -1, 0], [0.5, np.nan, 0, 0], [0, 0, 0, 0]])
    drawing = logo("a title", "in words", "ACN", [2.0, -1.0, 0.0], changes, first=7)
    tall = {
        shape[2]: max(y for points in shape[1] for _, y in points) - min(y for points in shape[1] for _, y in points)
        for shape in drawing.shapes
        if shape[0] == "areas"
    }
    assert abs(tall["c2"] - 2 * tall["c0"]) < 1e-6, "A is twice as tall as C"
    boxes = [shape for shape in drawing.shapes if shape[0] == "boxes"]
    assert sorted((shape[2], shape[3]) for shape in boxes) == [("mark", 0.5), ("mark", 1.0), ("second", 1.0)]
    assert "in words" in drawing.svg(alone=True) and ">7</text>" in drawing.svg()
    drawing.write_png(tmp_path / "logo.png")
    assert (tmp_path / "logo.png").stat().st_size > 1000
