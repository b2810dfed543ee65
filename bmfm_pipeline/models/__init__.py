"""Models: field embeddings, an encoder, heads; as transformers models with safetensors weights.

Importing this room registers its types with AutoConfig and AutoModel, so it imports torch and transformers.
"""

from bmfm_pipeline.models.backbone import Backbone, MultitaskOutput
from bmfm_pipeline.models.configuration import (
    MultitaskConfig,
    SCBertConfig,
    SCLlamaConfig,
    SCModernBertConfig,
    SCNystromformerConfig,
    SCPerformerConfig,
    describe_label_dict,
)
from bmfm_pipeline.models.importing import convert_checkpoint, model_folder
from bmfm_pipeline.models.loading import (
    LoadReport,
    initialise_from,
    load_model,
    load_weights,
    read_config,
    read_state_dict,
)
from bmfm_pipeline.models.multitask import MultitaskModel
from bmfm_pipeline.models.pooling import POOLING_METHODS, pool
from bmfm_pipeline.models.registry import BACKBONES, build_model, find_backbone, register_auto_classes
from bmfm_pipeline.models.scbert import SCBertForMultitask
from bmfm_pipeline.models.scllama import SCLlamaForMultitask
from bmfm_pipeline.models.scmodernbert import SCModernBertForMultitask
from bmfm_pipeline.models.scnystromformer import SCNystromformerForMultitask
from bmfm_pipeline.models.scperformer import SCPerformerForMultitask

__all__ = [
    "BACKBONES",
    "POOLING_METHODS",
    "Backbone",
    "LoadReport",
    "MultitaskConfig",
    "MultitaskModel",
    "MultitaskOutput",
    "SCBertConfig",
    "SCBertForMultitask",
    "SCLlamaConfig",
    "SCLlamaForMultitask",
    "SCModernBertConfig",
    "SCModernBertForMultitask",
    "SCNystromformerConfig",
    "SCNystromformerForMultitask",
    "SCPerformerConfig",
    "SCPerformerForMultitask",
    "build_model",
    "convert_checkpoint",
    "describe_label_dict",
    "find_backbone",
    "initialise_from",
    "load_model",
    "load_weights",
    "model_folder",
    "pool",
    "read_config",
    "read_state_dict",
    "register_auto_classes",
]

register_auto_classes()
