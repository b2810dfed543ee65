"""Models: field embeddings, an encoder, heads; as transformers models with safetensors weights.

Importing this room registers its types with AutoConfig and AutoModel, so it imports torch and transformers.
"""

from bmfm_pipeline.models.configuration import MultitaskConfig, SCBertConfig, describe_label_dict
from bmfm_pipeline.models.loading import (
    LoadReport,
    initialise_from,
    load_model,
    load_weights,
    read_config,
    read_state_dict,
)
from bmfm_pipeline.models.multitask import MultitaskModel, MultitaskOutput
from bmfm_pipeline.models.pooling import POOLING_METHODS, pool
from bmfm_pipeline.models.registry import BACKBONES, build_model, find_backbone, register_auto_classes
from bmfm_pipeline.models.scbert import SCBertForMultitask

__all__ = [
    "BACKBONES",
    "POOLING_METHODS",
    "LoadReport",
    "MultitaskConfig",
    "MultitaskModel",
    "MultitaskOutput",
    "SCBertConfig",
    "SCBertForMultitask",
    "build_model",
    "describe_label_dict",
    "find_backbone",
    "initialise_from",
    "load_model",
    "load_weights",
    "pool",
    "read_config",
    "read_state_dict",
    "register_auto_classes",
]

register_auto_classes()
