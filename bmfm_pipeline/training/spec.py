"""What a training child is told, and what it leaves behind: plain JSON both ways."""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bmfm_pipeline.storage import read_json

EXIT_PREEMPTED = 75  # EX_TEMPFAIL: try again


@dataclass(frozen=True)
class TrainSpec:
    """One training. `config` is RunConfig.model_dump(mode="json"); `data` and `init_from` are local folders.

    `shared` says where a remote workspace keeps a copy of the checkpoints: {"uri", "job": what is told about it there}.
    """

    stage: str
    config: dict[str, Any]
    data: str
    run_dir: str
    init_from: str | None = None
    shared: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_file(cls, path: str | Path) -> "TrainSpec":
        return cls(**read_json(path))


@dataclass(frozen=True)
class TrainResult:
    """Where a finished training left its checkpoints, its model folder and its history, and its numbers."""

    best: Path
    last: Path
    model_dir: Path
    history: Path
    summary: dict[str, Any] = field(default_factory=dict)
