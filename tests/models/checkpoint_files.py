"""Files as torch.save writes them: with a pickle of our choosing, or of objects of classes that bmfm_targets has and we have not."""

import contextlib
import sys
import types
import zipfile
from pathlib import Path

import torch

CONFIG, TOKENIZATION, TRAINING = (
    f"bmfm_targets.config.{name}" for name in ("model_config", "tokenization_config", "training_config")
)


def write_archive(
    path: Path, pickled: bytes, records: dict[str, bytes] | None = None, compression=zipfile.ZIP_STORED
) -> Path:
    """A zip archive with `pickled` as its data.pkl and `records` as the bytes of its tensors."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        archive.writestr("archive/data.pkl", pickled)
        archive.writestr("archive/byteorder", b"little")
        for name, data in (records or {}).items():
            archive.writestr(f"archive/data/{name}", data)
    return path


@contextlib.contextmanager
def foreign_classes():
    """make(module, name, **attributes) -> an object of that class, while it can be pickled."""
    before = dict(sys.modules)

    def make(module: str, name: str, **attributes):
        parts = module.split(".")
        for end in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:end]), types.ModuleType(".".join(parts[:end])))
        place = sys.modules[module]
        if not hasattr(place, name):
            setattr(place, name, type(name, (), {"__module__": module}))
        made = getattr(place, name)()
        made.__dict__.update(attributes)
        return made

    try:
        yield make
    finally:
        for name in set(sys.modules) - set(before):
            if name.startswith("bmfm_targets"):
                del sys.modules[name]


def write_foreign(
    path: Path,
    settings: dict,
    fields: list[dict],
    labels: list[dict],
    state: dict,
    label_dict=None,
    kind="SCBertConfig",
):
    """A Lightning checkpoint with configuration objects, as bmfm_targets writes it."""
    with foreign_classes() as make:
        config = make(
            CONFIG,
            kind,
            **settings,
            fields=[make(TOKENIZATION, "FieldInfo", **entry) for entry in fields],
            label_columns=[make(TOKENIZATION, "LabelColumnInfo", **entry) for entry in labels],
        )
        trainer = make(TRAINING, "TrainerConfig", losses=None, pooling_method="first_token", learning_rate=1e-3)
        torch.save(
            {
                "state_dict": {f"model.{name}": tensor for name, tensor in state.items()},
                "hyper_parameters": {"model_config": config, "trainer_config": trainer, "label_dict": label_dict},
                "pytorch-lightning_version": "2.6.6",
            },
            path,
        )
    return path
