"""Compiled layers: one form for all lengths, the names and numbers of the uncompiled model."""

import copy

import torch
from backbone_cases import batch, model_of
from torch._dynamo.utils import counters

from bmfm_pipeline.models import compiling
from bmfm_pipeline.models.compiling import compile_layers


def test_lengths_that_change_compile_nothing_anew():
    # Dynamo alone: generating code takes most of a minute and changes nothing that is looked at here.
    torch._dynamo.reset()
    model = model_of("scbert", num_hidden_layers=2).train()
    names, plain = list(model.state_dict()), copy.deepcopy(model)
    said = []
    assert compile_layers(model, True, "cpu", said.append, backend="eager") and "2 layers are compiled" in said[0]
    assert list(model.state_dict()) == names
    graphs = []
    for lengths in ((12, 9, 4), (11, 11, 3), (10, 6, 2)):
        ids, mask = batch(3, 12, lengths)
        got, wanted = (one(ids, mask, positions={}).logits["celltype"] for one in (model, plain))
        assert torch.allclose(got, wanted, atol=1e-5)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] == graphs[-1] > 0
    with torch.no_grad():
        plain.load_state_dict(model.state_dict())
        model.load_state_dict({key: value * 1.1 for key, value in plain.state_dict().items()})
    assert not torch.allclose(model(ids, mask, positions={}).logits["celltype"], wanted, atol=1e-3)
    torch._dynamo.reset()


def test_without_a_compiler_the_model_runs_as_it_is_and_says_so(monkeypatch):
    monkeypatch.setattr(compiling.shutil, "which", lambda _: None)
    said = []
    assert not compile_layers(torch.nn.Linear(2, 2), True, "cpu", said.append)
    assert "no C++ compiler" in said[0] and "task.compile=false" in said[0]
    assert not compile_layers(torch.nn.Linear(2, 2), False, "cpu", said.append) and len(said) == 1
