"""The trainer.lora_config section: which layers get low-rank adapters, and how large these are."""

from typing import Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from bmfm_pipeline.config.strict import Absent, Section
from bmfm_pipeline.config.targets import BUILDABLE_MODELS
from bmfm_pipeline.errors import ConfigError

# Names of presets by the model type that they are for; None fits every type.
PRESETS: dict[str, str | None] = {
    "default": None,
    **{name: name for name in BUILDABLE_MODELS},
    **{name.removeprefix("sc"): name for name in BUILDABLE_MODELS if name != "scbert"},
}
# What says nothing about the adapters themselves: kinds of heads, which are ours.
_TASK_TYPES = (None, "SEQ_CLS", "TOKEN_CLS", "FEATURE_EXTRACTION")


class LoraSettings(Section):
    """Low-rank adapters in the encoder (LoRA, Hu et al. 2022; DoRA with `use_dora`, Liu et al. 2024). Its other weights stay as they are.

    `preset` names layers to adapt: `default` takes those of the model's own type. `target_modules` names them instead: last parts of
    names, one regular expression over whole names, or all-linear. `layers_to_transform`: numbers of the layers to adapt, all when
    null; `layers_pattern`: the name before the number where it is not the type's own. `bias`: which biases of the model are trained.
    """

    absent: ClassVar[dict[str, Absent]] = {
        "task_type": Absent(_TASK_TYPES, "remove it: heads are always trained in full")
    }

    preset: str | None = None
    r: int = Field(16, gt=0)
    lora_alpha: float = Field(32, gt=0)
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    bias: Literal["none", "all", "lora_only"] = "none"
    use_dora: bool = True
    layers_to_transform: list[int] | None = None
    layers_pattern: list[str] | None = None
    target_modules: list[str] | str | None = None

    @field_validator("preset")
    @classmethod
    def _known_preset(cls, value: str | None) -> str | None:
        if value is not None and value not in PRESETS:
            raise ValueError(f"there is no preset {value!r}; there are {', '.join(PRESETS)}")
        return value

    @field_validator("layers_to_transform", "layers_pattern", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        return [value] if isinstance(value, int | str) else value

    @field_validator("layers_to_transform", "layers_pattern", "target_modules")
    @classmethod
    def _not_empty(cls, value: Any) -> Any:
        if value is not None and not value:
            raise ValueError("is empty; name at least one, or leave it out")
        return value

    @model_validator(mode="after")
    def _names_its_layers_once(self) -> "LoraSettings":
        if self.preset and self.target_modules:
            raise ValueError(f"preset {self.preset} and target_modules both name the layers to adapt; keep one of them")
        if not self.target_modules:
            self.preset = self.preset or "default"
        return self

    def check_type(self, model_type: str) -> None:
        """ConfigError when the preset is for another model type."""
        if self.model_type not in (None, model_type):
            raise ConfigError(
                f"trainer.lora_config: the preset {self.preset} names layers of {self.model_type}, but the model is {model_type}; use the "
                "preset default, which takes those of the model's own type"
            )

    @property
    def model_type(self) -> str | None:
        """The model type that the preset is for; None where it fits all."""
        return PRESETS[self.preset] if self.preset else None


def read_lora(value: Any) -> Any:
    """`trainer.lora_config` as a person may write it: null, a preset's name, or a mapping of keys."""
    if isinstance(value, str):
        return {"preset": value}
    return value
