"""The course of a training as its page tells it: from events, and from the history of the part before a stop."""

import base64
import json
import re

import pytest

from flows.course import MOST_POINTS, Course, Points, sparkline


def progress(step: int, loss: float, **more) -> dict:
    return {"kind": "progress", "step": step, "max_steps": 100, "epoch": step // 50, "loss": loss, **more}


def validation(step: int, loss: float, accuracy: float) -> dict:
    metrics = {"validation/loss": loss, "validation/celltype_accuracy": accuracy, "validation/celltype_n": 70}
    return {"kind": "validation", "step": step, "metrics": metrics}


@pytest.fixture
def course() -> Course:
    found = Course()
    found.add({"kind": "start", "parameters": 1200, "trained_parameters": 200})
    for step in range(10, 70, 10):
        found.add(progress(step, 3 - step / 50, cells_per_s=812.4, eta_s=95.0, loader_wait_share=0.02))
    for step, loss in ((20, 2.5), (40, 2.1), (60, 2.3)):
        found.add(validation(step, loss, step / 100))
    return found


def test_a_training_of_sequences_is_not_said_to_be_of_cells():
    found = Course()
    found.add(progress(10, 1.0, cells_per_s=90.0, observed="sequences"))
    assert "90 sequences/s" in found.line() and "| speed | 90 sequences/s |" in found.page("t", {}, "now")


def test_one_line_says_where_it_is_and_what_was_best(course):
    assert course.share == 0.6
    assert course.line() == (
        "step 60 of 100, epoch 2, loss 1.800 █▇▅▄▂▁, 812.4 cells/s, about 1 min 35 s left, best validation loss 2.100 at step 40"
    )


def test_the_page_has_the_curve_the_numbers_and_the_links(course):
    page = course.page("pretrain of cells", {"MLflow run": "http://127.0.0.1:5000/#/x"}, "Updated now.")
    svg = base64.b64decode(re.search(r"data:image/svg\+xml;base64,([^)]+)\)", page)[1]).decode()
    assert svg.startswith("<svg") and "train/loss 1.800" in svg and "validation/loss 2.300" in svg
    assert "| best validation loss | 2.100 at step 40; 3 validations |" in page
    assert "| celltype_accuracy there | 0.400 |" in page and "celltype_n" not in page
    assert "| speed | 812.4 cells/s; 2.0 % of the time waiting for data |" in page
    assert "| parameters | 1,200, 200 of them trained |" in page
    assert "[MLflow run](http://127.0.0.1:5000/#/x)" in page


def test_a_training_that_goes_on_shows_what_was_before_it(tmp_path):
    history = tmp_path / "history.jsonl"
    before = [{"step": 10, "train/loss": 3.0}, {"step": 20, "train/loss": 2.0}, {"step": 20, "validation/loss": 2.2}]
    history.write_text("".join(json.dumps(entry) + "\n" for entry in before) + '{"step": 30, "tra')
    course = Course(history)
    for kind in ("start", "start"):  # told again by a second try
        course.add({"kind": kind})
        course.add(progress(30, 1.0))
    assert "loss 1.000 █▅▁" in course.line() and "best validation loss 2.200 at step 20" in course.line()
    assert "| resumed | at step 20 |" in course.page("", {}, "")
    assert "3.000 at step 10" in course.page("", {}, "")


@pytest.mark.parametrize(
    ("event", "share", "words"),
    [
        ({"kind": "done", "summary": {"steps": 60}}, 1.0, "finished"),
        ({"kind": "preempted", "reason": "SIGTERM"}, 0.6, "stopped (SIGTERM) and saved; it goes on from there"),
        ({"kind": "error", "message": "the loss is nan"}, 0.6, "ended by an error: the loss is nan"),
    ],
)
def test_how_it_ended(course, event, share, words):
    course.add(event)
    assert course.share == share and words in course.line() and "left" not in course.line()


def test_a_step_without_a_loss_and_values_that_are_no_numbers():
    course = Course()
    assert (course.share, course.line()) == (None, "working")
    course.add({"kind": "progress", "step": 70, "max_steps": 140})
    course.add({"kind": "progress", "step": 105, "max_steps": 140, "loss": float("nan")})
    assert (course.share, course.line(), course.is_training) == (0.75, "step 105 of 140", False)


def test_the_points_of_days_fit_and_end_with_the_last_one():
    points = Points()
    for step in range(100_000):
        points.add(step, step)
    assert MOST_POINTS / 2 <= len(points.all) <= MOST_POINTS + 1
    assert points.all[0] == (0, 0) and points.all[-1] == (99_999, 99_999)
    gaps = [after - before for (before, _), (after, _) in zip(points.all, points.all[1:-1], strict=False)]
    assert len(set(gaps)) == 1


def test_a_sparkline_goes_by_steps_not_by_how_many_points_there_are():
    dense = [(step / 100, 1.0) for step in range(100)]
    assert sparkline([*dense, (1, 1.0), (2, 0.0), (3, 0.0), (4, 0.0)], width=4) == "██▁▁"
    assert sparkline([(1, 5.0), (2, 5.0)]) == "▁▁"
