"""Encoders of continuous values: a number per position becomes a vector.

A special token arrives as `-(id + 1)`, so every value below zero is a special token and ordinary values are zero or more.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from bmfm_pipeline.errors import ConfigError

_WIDTH = 128  # width of the small perceptrons, part of the weights' shapes
_PAD_ROW = 2


class MlpValueEncoder(nn.Module):
    """Linear(1, 128), LeakyReLU, Linear(128, H), LeakyReLU on every value; special tokens are treated as numbers."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.dense_1 = nn.Linear(1, _WIDTH)
        self.dense_2 = nn.Linear(_WIDTH, hidden_size)
        self.activation = nn.LeakyReLU()

    def forward(self, values: Tensor) -> Tensor:
        """(...) numbers -> (..., H)"""
        narrow = self.activation(self.dense_1(values.to(self.dense_1.weight.dtype).unsqueeze(-1)))
        return self.activation(self.dense_2(narrow))


def _special_rows(values: Tensor, zero_row: int | None) -> tuple[Tensor, Tensor]:
    """Which values are special tokens, and the row of each in the table of special embeddings (row 0 elsewhere)."""
    special = values < 0
    rows = torch.where(special, -values - 1, torch.zeros_like(values))
    if zero_row is not None:
        zero = values == 0
        special = special | zero
        rows = rows.masked_fill(zero, zero_row)
    return special, rows.to(torch.int64)


class MlpWithSpecialTokens(nn.Module):
    """A perceptron for numbers and a table for special tokens (and, by default, for exact zero), then one shared Linear(128, H)."""

    def __init__(self, hidden_size: int, num_special_tokens: int, zero_as_special_token: bool = True):
        super().__init__()
        self.zero_row = num_special_tokens if zero_as_special_token else None
        self.dense_1 = nn.Linear(1, _WIDTH)
        self.dense_2 = nn.Linear(_WIDTH, hidden_size)
        self.special_token_embeddings = nn.Embedding(
            num_special_tokens + int(zero_as_special_token), _WIDTH, padding_idx=_PAD_ROW
        )
        self.activation = nn.LeakyReLU()

    def forward(self, values: Tensor) -> Tensor:
        """(...) numbers -> (..., H)"""
        special, rows = _special_rows(values, self.zero_row)
        narrow = self.activation(self.dense_1(values.to(self.dense_1.weight.dtype).unsqueeze(-1)))
        narrow = torch.where(special.unsqueeze(-1), self.special_token_embeddings(rows).to(narrow.dtype), narrow)
        return self.dense_2(self.activation(narrow))


class ScaleAdaptEncoder(nn.Module):
    """Fourier features: sin and cos of a number at several frequencies (learned, or fixed octaves), optional sigmoids, then Linear.

    Special tokens (and, by default, exact zero) have their own table of width H and skip the features.
    """

    def __init__(
        self,
        hidden_size: int,
        num_special_tokens: int,
        pad_token_id: int,
        n_sin_basis: int = 48,
        basis_scale: float = 1.5,
        shift: float = 0.0,
        trainable: bool = True,
        zero_as_special_token: bool = True,
        sigmoid_centers: list[float] | None = None,
        sigmoid_orientations: list[float] | None = None,
    ):
        super().__init__()
        self.shift = shift
        self.basis_scale = basis_scale
        self.zero_row = num_special_tokens if zero_as_special_token else None
        centers = list(sigmoid_centers or [])
        orientations = list(sigmoid_orientations or [1.0] * len(centers))
        if len(centers) != len(orientations):
            raise ConfigError(
                f"encoder_kwargs: {len(centers)} sigmoid_centers but {len(orientations)} sigmoid_orientations"
            )
        if trainable:
            self.basis = nn.Parameter(torch.empty(n_sin_basis))
        else:
            self.register_buffer("basis", torch.empty(n_sin_basis))
        self.has_sigmoids = bool(centers)
        if self.has_sigmoids:
            self._centers, self._orientations = centers, orientations
            self.register_buffer("sigmoid_centers", torch.empty(len(centers)))
            self.register_buffer("sigmoid_orientations", torch.empty(len(centers)))
        self.dense = nn.Linear(2 * n_sin_basis + len(centers), hidden_size, bias=False)
        self.special_token_embeddings = nn.Embedding(
            num_special_tokens + int(zero_as_special_token), hidden_size, padding_idx=pad_token_id
        )
        frequencies = self.octaves()
        if not trainable and not torch.isfinite(frequencies).all():
            raise ConfigError(
                f"encoder_kwargs: {n_sin_basis} octaves from basis_scale {basis_scale} overflow; use fewer"
            )

    def octaves(self) -> Tensor:
        """Fixed frequencies 2 pi basis_scale 2^k."""
        return (2 * math.pi * self.basis_scale * 2.0 ** torch.arange(self.basis.numel(), dtype=torch.float64)).to(
            torch.float32
        )

    def first_buffers(self) -> dict[str, Tensor]:
        """What the buffers hold before training; called by the model's initialisation."""
        made = {} if isinstance(self.basis, nn.Parameter) else {"basis": self.octaves()}
        if self.has_sigmoids:
            made |= {
                "sigmoid_centers": torch.tensor(self._centers),
                "sigmoid_orientations": torch.tensor(self._orientations),
            }
        return made

    def forward(self, values: Tensor) -> Tensor:
        """(...) numbers -> (..., H). Phases are computed in float32 whatever the precision: they lose meaning in half precision."""
        special, rows = _special_rows(values, self.zero_row)
        with torch.autocast(values.device.type, enabled=False):
            numbers = (values.float() - self.shift).unsqueeze(-1)
            phases = numbers * self.basis.float()
            features = [torch.sin(phases), torch.cos(phases)]
            if self.has_sigmoids:
                features.append(
                    torch.sigmoid(numbers * self.sigmoid_orientations.float() - self.sigmoid_centers.float())
                )
            stacked = torch.cat(features, dim=-1)
        projected = self.dense(stacked.to(self.dense.weight.dtype))
        return torch.where(special.unsqueeze(-1), self.special_token_embeddings(rows).to(projected.dtype), projected)


DEFAULT_KIND = "mlp_with_special_token_embedding"


def build_value_encoder(
    name: str, kwargs: dict[str, Any] | None, hidden_size: int, num_special_tokens: int, pad_token_id: int
) -> nn.Module:
    """The encoder that `encoder_kwargs.kind` names. Raises ConfigError for an unknown kind or option."""
    options = dict(kwargs or {})
    kind = options.pop("kind", None) or DEFAULT_KIND
    makers = {
        "mlp": (MlpValueEncoder, {"hidden_size": hidden_size}),
        DEFAULT_KIND: (MlpWithSpecialTokens, {"hidden_size": hidden_size, "num_special_tokens": num_special_tokens}),
        "scale_adapt": (
            ScaleAdaptEncoder,
            {"hidden_size": hidden_size, "num_special_tokens": num_special_tokens, "pad_token_id": pad_token_id},
        ),
    }
    if kind not in makers:
        raise ConfigError(f"fields.{name}.encoder_kwargs.kind is {kind!r}; there are {', '.join(makers)}")
    if kind != "mlp" and num_special_tokens <= _PAD_ROW:
        raise ConfigError(
            f"fields.{name}.num_special_tokens is {num_special_tokens}: the encoder {kind!r} needs the number of special tokens of the "
            "tokenizer (5 for the standard vocabularies)"
        )
    maker, fixed = makers[kind]
    try:
        return maker(**fixed, **options)
    except TypeError as error:
        raise ConfigError(f"fields.{name}.encoder_kwargs: {error}") from None
