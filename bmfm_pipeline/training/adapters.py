"""Low-rank adapters (LoRA, DoRA): put into the encoder before training, saved apart and merged into plain weights after it.

peft does the arithmetic. Its layers stand in for the Linear layers they adapt, inside the model itself; what a model is called and how
it is called does not change, and a merged model has the names and shapes it would have without adapters.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from bmfm_pipeline.config.adapters import LoraSettings
from bmfm_pipeline.errors import CheckpointError, ConfigError
from bmfm_pipeline.models.loading import read_config
from bmfm_pipeline.models.schema import module_name

ADAPTER = "default"
WEIGHTS, SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_KEY = "trainer.lora_config"
# What peft puts in front of the names of a model that it wraps, in files too.
_WRAPPED = "base_model.model."


@dataclass(frozen=True)
class Adapted:
    """What was adapted: the `layers` that got adapters, and the `whole` parts of the model that are trained in full beside them."""

    kind: str
    rank: int
    layers: list[str]
    whole: list[str]

    def sentence(self, model: nn.Module) -> str:
        """In words, with the number of parameters that are trained."""
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        total = sum(p.numel() for p in model.parameters())
        return (
            f"{_KEY}: {self.kind} of rank {self.rank} in {len(self.layers)} layers of the encoder, {', '.join(self.whole) or 'no head'} "
            f"trained in full: {trained:,} of {total:,} parameters are trained"
        )


def layers_to_adapt(model: PreTrainedModel, settings: LoraSettings) -> list[str]:
    """Names of the Linear layers of the encoder that `settings` choose, in the order of the model.

    Raises ConfigError when a name, a pattern or a layer's number matches nothing.
    """
    inside = re.compile(model.encoder_pattern)
    names = [
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and inside.search(f"{name}.")
    ]
    kinds = sorted({name.rpartition(".")[2] for name in names})
    kind = model.config.model_type
    settings.check_type(kind)
    wanted = settings.target_modules or list(model.lora_targets)
    if wanted == "all-linear":
        chosen = names
    elif isinstance(wanted, str):
        try:
            chosen = [name for name in names if re.fullmatch(wanted, name)]
        except re.error as error:
            raise ConfigError(f"{_KEY}.target_modules: {wanted!r} is not a regular expression ({error})") from error
        if not chosen:
            raise ConfigError(
                f"{_KEY}.target_modules: no Linear layer of the encoder of this {kind} is matched as a whole by {wanted!r}; names look like "
                f"{names[0]}"
            )
    else:
        matched = {end: [name for name in names if f".{name}".endswith(f".{end}")] for end in wanted}
        if strangers := [end for end, found in matched.items() if not found]:
            raise ConfigError(
                f"{_KEY}.target_modules: the encoder of this {kind} has no Linear layer called {', '.join(strangers)}; it has "
                f"{', '.join(kinds)}"
            )
        together = {name for found in matched.values() for name in found}
        chosen = [name for name in names if name in together]
    return _in_layers(chosen, settings, kind)


def _in_layers(names: list[str], settings: LoraSettings, kind: str) -> list[str]:
    """Of `names` those that lie in the layers asked for."""
    if settings.layers_to_transform is None and settings.layers_pattern is None:
        return names
    before = "|".join(settings.layers_pattern) if settings.layers_pattern else r"\w+"
    numbered = re.compile(rf"\.(?:{before})\.(\d+)\.")
    numbers = {name: int(found[1]) for name in names if (found := numbered.search(name))}
    if not numbers:
        raise ConfigError(
            f"{_KEY}.layers_pattern: no layer of this {kind} is numbered behind {', '.join(settings.layers_pattern or [])}; names look "
            f"like {names[0]}"
        )
    wanted = settings.layers_to_transform
    if wanted is not None and (absent := sorted(set(wanted) - set(numbers.values()))):
        raise ConfigError(
            f"{_KEY}.layers_to_transform: there is no layer {', '.join(map(str, absent))}; layers are 0 to {max(numbers.values())}"
        )
    return [name for name, number in numbers.items() if wanted is None or number in wanted]


def adapt(
    model: PreTrainedModel, settings: LoraSettings | None, init_from: str | Path | None, seed: int
) -> Adapted | None:
    """Adapters as the config asks for, in a model whose weights come from the folder `init_from`; None where it asks for none.

    Raises ConfigError where there are no pretrained weights to adapt.
    """
    if settings is None:
        return None
    if init_from is None:
        raise ConfigError(
            f"{_KEY}: adapters go into pretrained weights, and model.checkpoint is null; name a model there, or set {_KEY}=null "
            f"(in `bmfm run`, finetune.{_KEY}=... adapts the model that the chain has pretrained)"
        )
    known = {item.name for item in read_config(init_from).input_fields}
    new = [item.name for item in model.config.input_fields if item.name not in known]
    return add_adapters(model, settings, new_fields=new, seed=seed)


def add_adapters(
    model: PreTrainedModel, settings: LoraSettings, *, new_fields: Collection[str] = (), seed: int = 0
) -> Adapted:
    """Put adapters into `model` in place. They begin without effect: the model computes as before.

    Trained are the adapters and, in full, what pretraining cannot know: the heads, the pooler and the embeddings of input fields
    named in `new_fields`; of these only what was trainable before. Everything else no longer gets a gradient.
    """
    from peft import LoraConfig, inject_adapter_in_model

    names = layers_to_adapt(model, settings)
    before = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    backbone = f"{model.base_model_prefix}."
    embeddings = f"{backbone}{model.embeddings_name}."
    starts = [
        "cls.",
        f"{backbone}pooler.",
        *(f"{embeddings}{module_name(field + '_embeddings')}" for field in new_fields),
    ]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(
            LoraConfig(
                r=settings.r,
                lora_alpha=settings.lora_alpha,
                lora_dropout=settings.lora_dropout,
                bias=settings.bias,
                use_dora=settings.use_dora,
                target_modules=names,
            ),
            model,
            adapter_name=ADAPTER,
        )
    whole: dict[str, None] = {}
    for name, parameter in model.named_parameters():
        if name in before and name.startswith(tuple(starts)):
            parameter.requires_grad_(True)
            whole[_part(name, backbone)] = None
    return Adapted("DoRA" if settings.use_dora else "LoRA", settings.r, names, list(whole))


def _part(name: str, backbone: str) -> str:
    """The part of the model that a parameter outside the encoder belongs to, as a module is called."""
    if name.startswith("cls."):
        return "cls"
    rest = name.removeprefix(backbone)
    return "pooler" if rest.startswith("pooler.") else next(part for part in rest.split(".") if "_embeddings" in part)


def has_adapters(model: nn.Module) -> bool:
    return getattr(model, "peft_config", None) is not None


def save_adapter(model: PreTrainedModel, folder: str | Path, adapted: Adapted) -> None:
    """Write the adapters and the parts trained in full in the form of peft, to put onto the same base again."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    settings = model.peft_config[ADAPTER]
    tensors = get_peft_model_state_dict(model, adapter_name=ADAPTER, save_embedding_layers=False)
    places = _modules_called(model, adapted.whole)
    for name, tensor in model.state_dict().items():
        if name.startswith(tuple(f"{place}." for place in places)):
            tensors[name] = tensor
    plain = {f"{_WRAPPED}{name}": tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
    save_file(plain, folder / WEIGHTS, metadata={"format": "pt"})
    described = {**settings.to_dict(), "modules_to_save": adapted.whole or None, "inference_mode": True}
    described["target_modules"] = adapted.layers
    (folder / SETTINGS).write_text(json.dumps(described, indent=2, default=str, sort_keys=True) + "\n")


def _modules_called(model: nn.Module, names: Collection[str]) -> list[str]:
    return [place for place, _ in model.named_modules() if place.rpartition(".")[2] in names]


def merge_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """Add the adapters to the weights they adapt and take them out: what is left has the names of a model without adapters."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge(safe_merge=True)
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, module.get_base_layer())
    del model.peft_config
    return model


def load_adapter(model: PreTrainedModel, folder: str | Path) -> PreTrainedModel:
    """Put a saved adapter onto `model`, which has the weights that it was trained on, and merge it.

    Raises CheckpointError when the folder holds no adapter or its tensors do not fit the model.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from safetensors.torch import load_file

    folder = Path(folder)
    if not (folder / SETTINGS).exists() or not (folder / WEIGHTS).exists():
        raise CheckpointError(
            f"{folder}: holds no adapter ({SETTINGS}, {WEIGHTS}); a model trained with {_KEY} has it in adapter/"
        )
    settings = LoraConfig.from_pretrained(str(folder))
    settings.modules_to_save, settings.inference_mode = None, False
    linear = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if strangers := sorted(set(settings.target_modules) - linear):
        raise CheckpointError(
            f"{folder}: adapts layers that this {type(model).__name__} does not have: {', '.join(strangers[:5])}"
        )
    inject_adapter_in_model(settings, model, adapter_name=ADAPTER)
    own = model.state_dict()
    for name, tensor in load_file(folder / WEIGHTS).items():
        bare = name.removeprefix(_WRAPPED)
        place = next((one for one in (bare, *_with_adapter_name(bare)) if one in own), None)
        if place is None or own[place].shape != tensor.shape:
            raise CheckpointError(f"{folder}: {bare} {tuple(tensor.shape)} does not fit this {type(model).__name__}")
        with torch.no_grad():
            own[place].copy_(tensor)
    return merge_adapters(model)


def _with_adapter_name(name: str) -> list[str]:
    """The names that a tensor of a file may have in a model, where the adapter's own name stands in them."""
    found = re.fullmatch(r"(.*\.lora_[A-Za-z_]+)(\.weight)?", name)
    return [f"{found[1]}.{ADAPTER}.weight", f"{found[1]}.{ADAPTER}"] if found else []
