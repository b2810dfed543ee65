"""Compiling the layers of a model with torch.compile."""

import os
import shutil
from collections.abc import Callable

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def compile_layers(
    model: torch.nn.Module, how: bool | str, device: str, tell: Callable[[str], None], backend: str = "inductor"
) -> bool:
    """Compile the encoder's layers in place as task.compile asks (True or one of MODES); whether that was possible.

    All layers share one compiled form, in which the number of positions is left open. Embeddings, heads and attention without padding
    run as they are. Names of weights stay. Without a C++ compiler on a processor nothing is compiled, and `tell` is told.
    """
    if not how:
        return False
    compiler = os.environ.get("CXX", "g++")
    if device == "cpu" and shutil.which(compiler) is None and shutil.which("clang++") is None:
        tell(
            f"task.compile {how}: there is no C++ compiler ({compiler}, clang++) here, so the model runs uncompiled; install one, name it in "
            "the environment variable CXX, or set task.compile=false"
        )
        return False
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    for layer in layers:
        layer.compile(dynamic=True, backend=backend, mode=None if how is True else how)
    tell(f"{len(layers)} layers are compiled with torch.compile; the first steps take longer")
    return True
