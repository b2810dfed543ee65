"""The training process: what it leaves behind, and what its end is in words. tests/faults stops, kills and starves it."""

import json
import os
import re
import signal
import subprocess
import sys
from collections import deque

import pytest
import torch
from training_cases import (
    assert_equal_to_rounding,
    checkpoint,
    exported,
    few_labels,
    history,
    losses,
    notes,
)

from bmfm_pipeline import load_model
from bmfm_pipeline.errors import Preempted, TrainingError
from bmfm_pipeline.storage import hash_file, read_json
from bmfm_pipeline.training import train_in_child
from bmfm_pipeline.training.child import is_out_of_memory, out_of_memory_message
from bmfm_pipeline.training.launch import _result, passing_on_sigterm


@pytest.mark.slow
def test_a_training_leaves_checkpoints_history_and_a_model_folder(cases):
    spec, events = cases.spec(task__max_epochs=3), []
    result = train_in_child(spec, on_progress=events.append)

    for path in (result.best, result.last):
        manifest = read_json(path.with_name(path.name + ".json"))
        assert manifest["sha256"] == hash_file(path)
        assert torch.load(path, weights_only=True)["global_step"] == manifest["step"]
    assert result.last.name == "last.ckpt"
    assert re.fullmatch(r"epoch=\d+-step=\d+-val_loss=\d+\.\d\d\.ckpt", result.best.name)
    assert sorted(path.name for path in result.last.parent.glob("*.ckpt")) == sorted([result.best.name, "last.ckpt"])

    assert json.loads((result.model_dir / "config.json").read_text())["hidden_size"] == 16
    for name in ("tokenizers/genes", "tokenizers/expressions"):
        assert (result.model_dir / name / "tokenizer.json").exists()
    for name in ("label_dict.json", "transforms.json"):
        assert (result.model_dir / name).read_bytes() == (cases.data / name).read_bytes()
    best = checkpoint(spec, result.best.name)["state_dict"]
    assert all(torch.equal(tensor, best[f"model.{name}"]) for name, tensor in exported(spec).items())
    assert sum(p.numel() for p in load_model(result.model_dir).parameters()) == result.summary["parameters"]

    assert [entry["step"] for entry in history(spec) if "train/loss" in entry] == list(range(1, 16))
    validated = [entry["validation/loss"] for entry in history(spec) if "validation/loss" in entry]
    assert len(validated) == 3
    assert min(validated) == result.summary["best_validation_loss"]
    assert (result.summary["steps"], result.summary["epochs"]) == (15, 3.0)
    assert 0 < result.summary["first_batch_after_s"] < 120
    assert any("FROM SCRATCH" in text for text in notes(events))
    for event in (event for event in events if event["kind"] == "progress"):
        assert event["max_steps"] == 15
        assert event["loss"] == pytest.approx(losses(spec)[event["step"] - 1])
        assert event["cells_per_s"] > 0 and event["observed"] == "cells"
        assert event["eta_s"] >= 0
        assert 0 <= event["loader_wait_share"] < 1
    assert [event["step"] for event in events if event["kind"] == "progress"][-1] == 15
    assert [event["step"] for event in events if event["kind"] == "validation"] == [5, 10, 15]


def test_an_allocation_that_fails_is_recognised_and_says_what_to_lower(cases):
    with pytest.raises(RuntimeError) as error:
        cases.train(cases.spec(model__intermediate_size=2**41))
    assert is_out_of_memory(error.value)
    assert re.search(r"tried to allocate \d+ bytes.*lower data_module.batch_size", out_of_memory_message(error.value))
    assert is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert not is_out_of_memory(ValueError("memory is fine"))


def test_the_end_of_a_child_is_put_into_words(tmp_path):
    with pytest.raises(Preempted, match="before it began"):
        _result(-signal.SIGTERM, {}, deque(), tmp_path)
    with pytest.raises(Preempted, match="SIGTERM"):  # torchrun ends with a code of its own
        _result(1, {"kind": "preempted", "reason": "SIGTERM"}, deque(), tmp_path)
    with pytest.raises(TrainingError, match="ended by SIGSEGV"):
        _result(-signal.SIGSEGV, {}, deque(), tmp_path)
    with pytest.raises(TrainingError, match=r"code 1(?s:.*)ImportError: no such thing"):
        _result(1, {}, deque(["ImportError: no such thing"]), tmp_path)
    summary = {"best_checkpoint": "last.ckpt"}
    assert _result(-6, {"kind": "done", "summary": summary}, deque(), tmp_path).summary == summary


@pytest.mark.slow
def test_two_processes_train_like_one_with_batches_twice_as_large_and_export_once(cases):
    """Of 41 cells, whose labels are mostly unknown, in steps of two batches by two processes: every sum and count is shared."""
    alone = cases.spec("alone", data_module__batch_size=4, **few_labels(cases))
    pair = cases.spec(
        "pair", data_module__batch_size=1, task__accumulate_grad_batches=2, task__devices=2, **few_labels(cases)
    )
    cases.train(alone)
    events = []
    result = train_in_child(pair, on_progress=events.append)
    assert [event["kind"] for event in events].count("done") == 1
    assert [event["kind"] for event in events].count("start") == 1
    assert result.summary["devices"] == 2
    assert_equal_to_rounding(pair, alone)
    load_model(result.model_dir)


def test_a_sigterm_to_the_parent_is_the_child_s_first_and_then_its_own():
    told = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: told.append(child.poll()))
    try:
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
        with passing_on_sigterm(child):
            os.kill(os.getpid(), signal.SIGTERM)
            assert child.wait(timeout=20) == -signal.SIGTERM
        assert told == [-signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)
        assert len(told) == 2
    finally:
        signal.signal(signal.SIGTERM, before)
