"""Convolutions in front of the encoder: what they see, and that packed sequences, saved models and old weights are as they should be."""

import pytest
import torch

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.models import build_model, load_model
from bmfm_pipeline.models.neighbourhood import Neighbourhood
from bmfm_pipeline.models.packing import Packing

TYPES = ["scbert", "scmodernbert", "scperformer", "scnystromformer", "scllama"]


def reader(model_type="scbert", **changes):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    settings = {"model_type": model_type, **sizes, "convolution_layers": 2, "convolution_width": 5, **changes}
    fields = [{"field_name": "dna_chunks", "vocab_size": 10}]
    return build_model(settings, fields, [{"label_column_name": "active", "n_unique_values": 2}]).eval()


def sequences(lengths=(12, 7, 3)):
    generator = torch.Generator().manual_seed(1)
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(5, 9, (len(lengths), 1, max(lengths)), generator=generator)
    return ids.masked_fill(mask[:, None] == 0, 2), mask


@pytest.mark.parametrize("model_type", TYPES)
@pytest.mark.parametrize("pooling", ["cls", "max"])
def test_packed_sequences_score_as_padded_ones(model_type, pooling):
    model = reader(model_type, classifier_pooling=pooling)
    ids, mask = sequences()
    assert Packing.of(mask)[1] is not None
    with torch.no_grad():
        padded = model(ids, mask).logits["active"]
        packed = model(ids, mask, positions={}).logits["active"]
        first = model(ids, mask, positions={}, first_only=True).logits["active"]
        alone = model(ids[1:2, :, :7], None, positions={}).logits["active"]
    for other in (packed, first):
        torch.testing.assert_close(other, padded, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(packed[1:2], alone, atol=1e-5, rtol=1e-4)


def test_a_position_sees_as_far_as_the_windows_reach():
    layers = reader().backbone.neighbourhood
    assert isinstance(layers, Neighbourhood)
    hidden = torch.randn(1, 20, 16, generator=torch.Generator().manual_seed(2))
    other = hidden.clone()
    other[0, 10] += 1
    with torch.no_grad():
        changed = (layers(hidden, None) - layers(other, None)).abs().sum(dim=-1)[0] > 1e-6
    assert torch.nonzero(changed).flatten().tolist() == list(range(6, 15)), "two windows of 5 reach 4 positions"


def test_the_convolutions_learn_are_saved_and_absent_where_nobody_asks(tmp_path):
    model = reader()
    ids, mask = sequences()
    model.train()(ids, mask, positions={}).logits["active"].square().sum().backward()
    assert all(part.grad.abs().sum() > 0 for part in model.backbone.neighbourhood.parameters())
    model.eval().save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(ids, mask, positions={}).logits["active"]
        assert torch.equal(load_model(tmp_path)(ids, mask, positions={}).logits["active"], expected)
    assert not [name for name in reader(convolution_layers=0).state_dict() if "neighbourhood" in name]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"convolution_width": 4}, "convolution_width is 4; it is odd"),
        ({"convolution_layers": -1}, "convolution_layers is -1"),
        ({"classifier_pooling": "median"}, "classifier_pooling is 'median'; there are 'cls', 'mean', 'max'"),
    ],
)
def test_settings_that_cannot_be_built_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        reader(**changes)
