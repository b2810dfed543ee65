"""Windows, rotary positions, memory tokens, and three ways to compute the same attention."""

import logging

import pytest
import torch
from backbone_cases import EXACT, FIELDS, LABELS, SIZES, batch, model_of, scores_of_row
from torch.nn.attention.flex_attention import BlockMask

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.models import SCLlamaConfig, build_model
from bmfm_pipeline.models.attention import (
    Surroundings,
    attend,
    attention_allowed,
    block_mask,
    can_flex,
    key_mask,
    visibility,
)
from bmfm_pipeline.models.scllama import allow_memory
from bmfm_pipeline.models.scmodernbert import rotary_table, rotate


@pytest.mark.filterwarnings("ignore:flex_attention called without")
@pytest.mark.parametrize("shape", ["none", "keys", "pairs"])
@pytest.mark.parametrize("window", [None, 3])
def test_flex_fused_and_classic_attention_agree(shape, window):
    generator = torch.Generator().manual_seed(0)
    width = 8 if shape == "keys" else 16  # the kernel of flex attention wants at least 16
    query, key, value = (torch.randn(2, 2, 40, width, generator=generator) for _ in range(3))
    mask = torch.ones(2, 40, dtype=torch.int64)
    mask[1, 33:] = 0
    if shape == "pairs":
        mask = (mask[:, :, None] * mask[:, None, :]) * (torch.rand(2, 40, 40, generator=generator) < 0.7)
        mask = mask | torch.diag_embed(torch.diagonal(mask, dim1=1, dim2=2) * 0 + 1)
    allowed = None if shape == "none" else attention_allowed(mask)
    hidden = torch.zeros(2, 40, 32)
    seen = visibility(allowed, hidden, "torch", 0.0, window)
    fused, _ = attend(query, key, value, seen, 0.0, "torch")
    classic, weights = attend(query, key, value, seen, 0.0, None)
    assert torch.allclose(fused, classic, atol=1e-5) and torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
    if window is not None:
        places = torch.arange(40)
        assert weights[..., (places[:, None] - places).abs() > window].abs().max() == 0
    if seen is not None:
        blocks = block_mask(allowed, 40, hidden.device, window)
        assert isinstance(blocks, BlockMask)
        flex, _ = attend(query, key, value, blocks, 0.0, "flex")
        real = torch.ones(2, 40, dtype=torch.bool) if shape == "none" else key_mask(mask)
        assert torch.allclose(flex.transpose(1, 2)[real], fused.transpose(1, 2)[real], atol=1e-5)


@pytest.mark.parametrize(("window", "length"), [(1, 80), (5, 84), (5, 101), (40, 250)])
def test_a_window_in_blocks_is_the_window(window, length):
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(3, 2, length, 8, generator=generator, requires_grad=True) for _ in range(3))
    mask = torch.ones(3, length, dtype=torch.int64)
    mask[1, length // 2 :], mask[2] = 0, 0
    for allowed in (None, attention_allowed(mask)):
        blocks = visibility(allowed, torch.zeros(3, length, 16), "torch", 0.0, window)
        dense = visibility(allowed, torch.zeros(3, length, 16), None, 0.0, window)
        assert isinstance(blocks, Surroundings) and isinstance(dense, torch.Tensor)
        got, wanted = (attend(query, key, value, seen, 0.0, "torch")[0] for seen in (blocks, dense))
        assert torch.allclose(got, wanted, atol=1e-5)
        pulls = [torch.autograd.grad(one.square().sum(), (query, key, value)) for one in (got, wanted)]
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*pulls, strict=True))


def test_long_cells_of_modernbert_do_not_depend_on_padding_or_on_the_way_attention_is_computed():
    ids, mask = batch(3, 120, (120, 77, 9))
    fused, classic = model_of("scmodernbert"), model_of("scmodernbert", attention="classic")
    with torch.no_grad():
        together, other = fused(ids, mask), classic(ids, mask)
        for row, length in enumerate((120, 77, 9)):
            alone = scores_of_row(fused(ids[row : row + 1, :, :length], mask[row : row + 1, :length]), 0, length)
            for output in (together, other):
                for key, value in scores_of_row(output, row, length).items():
                    assert torch.allclose(value, alone[key], atol=1e-5, rtol=1e-5), (row, key)


@pytest.mark.parametrize("name", EXACT)
def test_flex_without_a_gpu_is_computed_as_torch_and_says_so_once(name, caplog):
    can_flex.cache_clear()
    ids, mask = batch()
    flex, fused = model_of(name, attention="flex"), model_of(name)
    with caplog.at_level(logging.WARNING), torch.no_grad():
        first, _ = flex(ids, mask), flex(ids, mask)
    assert torch.equal(first.logits["celltype"], fused(ids, mask).logits["celltype"])
    assert [record.getMessage() for record in caplog.records if "flex" in record.getMessage()] == [
        "model.attention is flex, which needs a GPU: computed as torch, which gives the same numbers"
    ]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert not can_flex("cuda", 0.1)
    assert "no dropout" in caplog.text and can_flex("cuda", 0.0)


def test_dropout_of_attention_weights_is_on_in_training_only():
    ids, mask = batch()
    for name in EXACT:
        for attention in ("torch", None):
            model = model_of(name, attention=attention, attention_probs_dropout_prob=0.5)
            first, second = (model(ids, mask).logits["celltype"] for _ in range(2))
            assert torch.equal(first, second)
            first, second = (model.train()(ids, mask).logits["celltype"] for _ in range(2))
            assert not torch.allclose(first, second)


def test_rotary_positions_depend_on_distances_only():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(8, generator=generator).expand(1, 1, 30, 8) for _ in range(2))
    table = rotary_table(30, 8, 10000.0, torch.device("cpu"))
    scores = (rotate(query, table) @ rotate(key, table).transpose(-1, -2))[0, 0]
    for distance in (0, 1, 7):
        along = torch.diagonal(scores, distance)
        assert torch.allclose(along, along[:1].expand_as(along), atol=1e-4)
    assert (scores[0, 1:] - scores[0, 0]).abs().max() > 0.1
    assert rotate(query.half(), table).dtype == torch.float16


def test_local_layers_of_modernbert_see_a_window_and_turn_by_their_own_base():
    ids, mask = batch(2, 12, (12, 12))
    options = {"num_hidden_layers": 2, "global_attn_every_n_layers": 5, "local_attention": 4}

    def states(moved=None, **changes):
        model = model_of("scmodernbert", **{**options, **changes})
        other = ids.clone()
        if moved is not None:
            other[:, 0, moved] = 9.0
        with torch.no_grad():
            return model(other, mask, output_hidden_states=True).hidden_states

    plain, changed = states(), states(moved=0)
    reach = ((plain[1] - changed[1]).abs().amax(-1) > 1e-6)[0]
    assert reach.all()  # layer 0 is global
    only_local = model_of("scmodernbert", **options)
    only_local.backbone.layers[0].is_global = False
    with torch.no_grad():
        other = ids.clone()
        other[:, 0, 0] = 9.0
        a, b = (only_local(x, mask, output_hidden_states=True).hidden_states for x in (ids, other))
    for layer, last in ((1, 2), (2, 4)):
        reach = ((a[layer] - b[layer]).abs().amax(-1) > 1e-6)[0]
        assert reach[: last + 1].all() and not reach[last + 1 :].any()
    # The base of local layers acts by default, and not in the published arithmetic.
    base = {"local_rope_theta": 50.0}
    assert torch.equal(plain[1], states(**base)[1]) and not torch.allclose(plain[2], states(**base)[2], atol=1e-4)
    legacy = {"legacy_attention": True}
    assert torch.equal(states(**legacy)[2], states(**legacy, **base)[2])
    assert not torch.allclose(states(**legacy)[2], plain[2], atol=1e-4)
    assert torch.allclose(states(**legacy)[2], states(local_rope_theta=160000.0)[2], atol=1e-6)


def test_biases_of_modernbert_are_there_when_asked_for():
    names = [name for name, _ in model_of("scmodernbert").backbone.layers.named_parameters() if name.endswith("bias")]
    assert names == []
    model = model_of("scmodernbert", attention_bias=True, mlp_bias=True, norm_bias=True)
    names = [name for name, _ in model.backbone.layers[1].named_parameters() if name.endswith("bias")]
    assert len(names) == 6


def test_memory_tokens_are_read_and_taken_off_again():
    ids, mask = batch()
    model = model_of("scllama", num_memory_tokens=3)
    output = model(ids, mask, output_hidden_states=True)
    assert output.last_hidden_state.shape == (4, 12, 32) and output.hidden_states[0].shape == (4, 12, 32)
    with torch.no_grad():
        model.backbone.encoder.aux_tokens.add_(1.0)
        assert not torch.allclose(output.logits["celltype"], model(ids, mask).logits["celltype"], atol=1e-4)


def test_memory_tokens_do_not_see_what_is_hidden_from_the_rest():
    seen = torch.tensor([[[1, 0, 1], [0, 1, 0], [1, 0, 1]]])  # position 1 is seen by itself only
    wider = allow_memory(attention_allowed(seen), 2)[0, 0].long()
    assert wider.tolist() == [
        [1, 0, 1, 1, 1],
        [0, 1, 0, 1, 1],
        [1, 0, 1, 1, 1],
        [1, 0, 1, 1, 1],
        [1, 0, 1, 1, 1],
    ]
    assert allow_memory(attention_allowed(torch.tensor([[1, 0]])), 1).tolist() == [[[[True, False, True]]]]


def test_llama_widens_its_feed_forward_in_steps():
    for size, width in ((32, 256), (384, 1024), (768, 2048)):
        assert SCLlamaConfig(hidden_size=size, num_attention_heads=4).feed_forward_size == width
    assert SCLlamaConfig(hidden_size=768, intermediate_size=100).feed_forward_size == 100


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("scmodernbert", {"num_attention_heads": 32}, "is odd; rotary"),
        ("scmodernbert", {"local_attention": 0}, "local_attention is 0"),
        ("scmodernbert", {"attention": "flash"}, "attention is 'flash'"),
        ("scllama", {"num_memory_tokens": -1}, "num_memory_tokens is -1"),
        ("scllama", {"kernel_type": "exp"}, "scllama has no such setting"),
    ],
)
def test_impossible_settings_are_refused(name, change, words):
    with pytest.raises(ConfigError, match=words):
        build_model({"model_type": name, **SIZES, **change}, FIELDS, LABELS)
