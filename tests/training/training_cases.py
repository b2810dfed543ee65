"""Tiny trainings on real cells: in this process where the loop matters, in the real child where the process does."""

import contextlib
import functools
import io
import json
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from bmfm_pipeline.config import RunConfig, compose
from bmfm_pipeline.training import PreparedData, TrainSpec
from bmfm_pipeline.training.stopping import StopRequest

TINY = {
    "model.hidden_size": 16,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2,
    "model.intermediate_size": 32,
    "data_module.batch_size": 20,
    "data_module.max_length": 32,
    "data_module.limit_dataset_samples": {"train": 100, "dev": 30, "test": 20},
    "trainer.learning_rate": 3e-3,
    "trainer.warmup_steps": 2,
    "task.log_every_n_steps": 1,
    "task.max_epochs": 2,
    "task.accelerator": "cpu",
    "task.precision": "32-true",
}
CONFIGS = {"pretrain": "pre_train_config", "finetune": "fine_tune_train_config"}


@functools.cache
def _base(stage: str) -> str:
    return json.dumps(compose(CONFIGS[stage], ["dataset=zheng68k-mini", "preset=none"]).model_dump(mode="json"))


def run_config(stage: str = "pretrain", **changes) -> RunConfig:
    """The packaged config of a stage with tiny sizes; `changes` are dotted keys, written with __ for the dot."""
    plain = json.loads(_base(stage))
    for key, value in {**TINY, **{name.replace("__", "."): value for name, value in changes.items()}}.items():
        section, _, name = key.rpartition(".")
        (plain[section] if section else plain)[name] = value
    return RunConfig.model_validate(plain)


class StopAtLook(StopRequest):
    """Asks to stop when training looks for the n-th time whether it should: before the first batch, after a step, in a validation."""

    def __init__(self, look: int | None = None):
        self.looks, self.look = 0, look

    @property
    def reason(self) -> str | None:
        self.looks += 1
        return "a test" if self.look is not None and self.looks > self.look else None

    def watch(self) -> None:
        """Signals are left to the tests."""


@dataclass
class Cases:
    """Trainings of one test on the preprocessed cells in `data`, each in a folder of its own."""

    data: Path
    folder: Path

    def spec(self, name: str = "run", stage: str = "pretrain", init_from: Path | None = None, **changes) -> TrainSpec:
        if init_from is not None:  # heads differ between pretraining and fine-tuning
            changes.setdefault("model__load", "backbone")
        config = run_config(stage, **changes).model_dump(mode="json")
        start = None if init_from is None else str(init_from)
        return TrainSpec(stage, config, str(self.data), str(self.folder / name), start)

    def train(self, spec: TrainSpec, stop: StopRequest | None = None) -> tuple[dict | None, list[dict]]:
        """Train in this process: the summary (None when stopped) and the events."""
        from bmfm_pipeline.training.child import train

        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        lines = io.StringIO()
        try:
            with contextlib.redirect_stdout(lines):
                summary = train(spec, stop or StopAtLook())
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        return summary, [json.loads(line) for line in lines.getvalue().splitlines() if line.startswith('{"kind"')]


def history(spec: TrainSpec) -> list[dict]:
    return [json.loads(line) for line in (Path(spec.run_dir) / "history.jsonl").read_text().splitlines()]


def losses(spec: TrainSpec) -> list[float]:
    """The training losses by step."""
    return [entry["train/loss"] for entry in history(spec) if "train/loss" in entry]


def exported(spec: TrainSpec) -> dict[str, torch.Tensor]:
    return load_file(Path(spec.run_dir) / "model" / "model.safetensors")


def checkpoint(spec: TrainSpec, name: str = "last.ckpt") -> dict:
    return torch.load(Path(spec.run_dir) / "checkpoints" / name, weights_only=True)


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def assert_same_training(spec: TrainSpec, reference: TrainSpec) -> None:
    """The same loss curve with the same validations, the same last and the same best weights."""
    assert history(spec) == history(reference)
    assert equal(checkpoint(spec)["state_dict"], checkpoint(reference)["state_dict"])
    assert equal(exported(spec), exported(reference))


def few_labels(cases: Cases, **changes) -> dict:
    """Changes for two losses without dropout, one of them on a label that most of 41 cells lack.

    A larger epsilon than usual, because AdamW makes steps of full size of gradients that are nothing but rounding.
    """
    names = list(PreparedData(cases.data).label_dict["celltype"])
    return {
        "model__hidden_dropout_prob": 0,
        "model__attention_probs_dropout_prob": 0,
        "trainer__epsilon": 1e-4,
        "data_module__limit_dataset_samples": {"train": 41, "dev": 9, "test": 20},
        "data_module__collation_strategy": "multitask",
        "trainer__losses": None,
        "label_columns": [{"label_column_name": "celltype", "silent_label_values": names[:7]}],
        **changes,
    }


def assert_equal_to_rounding(spec: TrainSpec, reference: TrainSpec) -> None:
    """The same loss curve, the same validations and the same weights to 1e-6."""

    def numbers(entry: dict) -> dict:
        return {name: value for name, value in entry.items() if name != "epoch"}

    found, expected = history(spec), history(reference)
    assert [numbers(entry) for entry in found] == [pytest.approx(numbers(entry), rel=1e-6) for entry in expected]
    weights, others = exported(spec), exported(reference)
    assert weights.keys() == others.keys()
    for name, value in weights.items():
        torch.testing.assert_close(value, others[name], rtol=0, atol=1e-6)


def notes(events: list[dict]) -> list[str]:
    return [event["message"] for event in events if event["kind"] == "note"]
