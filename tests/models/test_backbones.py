"""What every backbone promises: padding and neighbours change nothing, gradients reach everything, saving keeps everything."""

import copy

import pytest
import torch
from backbone_cases import EXACT, FIELDS, LABELS, NAMES, OWN, SIZES, batch, check_positions, model_of, scores_of_row
from transformers import AutoConfig, AutoModel

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.models import build_model, initialise_from, load_model, pool

# Ways to attend that have to give the same guarantees.
VARIANTS = [
    *[(name, {}) for name in NAMES],
    *[(name, {"attention": "classic"}) for name in EXACT],
    *[("scperformer", {"kernel_type": kernel}) for kernel in ("cosh", "relu", "elu")],
    ("scperformer", {"normalize_output": False}),
    *[("scnystromformer", {"inverse_method": method}) for method in ("newton", "chebyshev")],
    ("scnystromformer", {"num_landmarks": 3}),
    ("scnystromformer", {"num_landmarks": 64}),
    ("scmodernbert", {"local_attention": 2, "global_attn_every_n_layers": 2}),
    ("scllama", {"num_memory_tokens": 0}),
    *[(name, {"classifier_pooling": "mean", "position_embedding_type": "sinusoidal"}) for name in NAMES],
    *[(name, {"classifier_pooling": "max", "convolution_layers": 2, "convolution_width": 5}) for name in NAMES],
]
ids_of = [f"{name}-{'-'.join(map(str, changes.values()))}" for name, changes in VARIANTS]


def same(first, second, tolerance=1e-5):
    for key, value in first.items():
        assert torch.allclose(value, second[key], atol=tolerance, rtol=tolerance), (
            key,
            (value - second[key]).abs().max(),
        )


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=ids_of)
def test_padding_and_neighbours_change_nothing(name, changes):
    model = model_of(name, **changes)
    ids, mask = batch(5, 12, (12, 11, 7, 3, 1 + 1))
    longer, wider = torch.nn.functional.pad(ids, (0, 19), value=2.0), torch.nn.functional.pad(mask, (0, 19))
    longer[:, 1, 12:] = -3.0
    noisy = longer.clone()
    noisy[:, 0, 12:], noisy[:, 1, 12:] = 17.0, 4.0  # what stands under the padding must not matter
    with torch.no_grad():
        together, padded, disturbed = model(ids, mask), model(longer, wider), model(noisy, wider)
        for row, length in enumerate(mask.sum(dim=1).tolist()):
            alone = model(ids[row : row + 1, :, :length], mask[row : row + 1, :length])
            unmasked = model(ids[row : row + 1, :, :length])
            expected = scores_of_row(alone, 0, length)
            for other, place in ((unmasked, 0), (together, row), (padded, row), (disturbed, row)):
                same(expected, scores_of_row(other, place, length))
            for method in ("first_token", "pooling_layer", "mean_pooling", [0, 1]):
                assert torch.allclose(
                    pool(alone, None, method)[0], pool(padded, wider, method)[row], atol=1e-5, rtol=1e-5
                ), method


@pytest.mark.parametrize("name", NAMES)
def test_gradients_reach_every_parameter(name):
    model = model_of(name).train()
    ids, mask = batch()
    ids[0, 1, 4] = 0.0  # exact zero has an embedding of its own
    ids[0, 0], ids[1, 1, 1:6] = torch.arange(12.0), -torch.arange(1.0, 6.0)
    output = model(ids, mask)
    sum(value.square().mean() for value in output.logits.values()).backward()
    frozen = {key for key, parameter in model.named_parameters() if not parameter.requires_grad}
    silent = {
        key
        for key, parameter in model.named_parameters()
        if parameter.requires_grad and (parameter.grad is None or not parameter.grad.abs().sum() > 0)
    }
    assert not silent
    # Published weights have these and do not apply them.
    assert {key.rpartition(".")[0].rpartition(".")[2] for key in frozen} <= {
        "hidden_activation_fn",
        "aux_proj",
        "dense",
    }
    poolers = {key for key in frozen if "pooler" in key}
    assert poolers == (
        {f"{name}.pooler.dense.{part}" for part in ("weight", "bias")} if name == "scmodernbert" else set()
    )


@pytest.mark.parametrize("name", NAMES)
def test_gradient_checkpointing_gives_the_same_gradients(name):
    ids, mask = batch()
    gradients = []
    for saving in (False, True):
        model = model_of(name).train()
        if saving:
            model.gradient_checkpointing_enable()
        model(ids, mask).logits["celltype"].square().sum().backward()
        gradients.append({key: p.grad for key, p in model.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    same(*gradients)


@pytest.mark.parametrize("name", NAMES)
def test_saved_models_come_back_whole_and_auto_classes_know_them(tmp_path, name):
    model = model_of(name)
    model.save_pretrained(tmp_path)
    ids, mask = batch()
    with torch.no_grad():
        expected = model(ids, mask).logits
        for again in (load_model(tmp_path), AutoModel.from_pretrained(tmp_path), type(model).from_pretrained(tmp_path)):
            assert type(again) is type(model)
            got = again.eval()(ids, mask).logits
            assert list(got) == list(expected)
            assert all(torch.equal(expected[key], got[key]) for key in expected)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(model.config) and config.to_dict() == again.config.to_dict()


@pytest.mark.parametrize("name", NAMES)
def test_a_fine_tune_takes_over_all_but_the_heads(tmp_path, name):
    torch.manual_seed(0)
    options = {"model_type": name, **SIZES, **OWN.get(name, {})}
    source = build_model(options, FIELDS)
    source.save_pretrained(tmp_path)
    torch.manual_seed(1)
    more = {"field_name": "perturbations", "vocab_size": 8}
    model = build_model(options, [*FIELDS, more], LABELS[:1])
    report = initialise_from(model, tmp_path, "backbone")
    assert report.clean and set(report.new_heads) == {"label head celltype", "input field perturbations"}
    before, after = source.state_dict(), model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("name", NAMES)
def test_heads_score_the_positions_asked_for(name):
    model = model_of(name)
    ids, mask = batch()
    check_positions(model, ids, mask)
    with pytest.raises(ValueError, match="position 1; the batch is 1 tokens"):
        model(ids[:, :, :1], mask[:, :1])


@pytest.mark.parametrize("name", NAMES)
def test_label_heads_share_a_group_reverse_gradients_and_read_their_position(name):
    model = model_of(name)
    ids, mask = batch()
    with torch.no_grad():
        output = model(ids, mask)
        heads = model.cls.label_predictions.predictions
        assert torch.allclose(output.logits["donor"], heads.label_decoders["donor"].decoder(output.head_states[:, 1]))
        shared = heads.task_groups["place"](output.embeddings)
        assert torch.allclose(output.logits["tissue"], heads.label_decoders["tissue"].decoder(shared), atol=1e-6)
        mvc = model.cls.predictions.predictions.head("expressions_mvc_regression")
        genes = model.backbone.embeddings.embed_field("genes", ids[:, 0])
        assert torch.allclose(output.logits["expressions_mvc_regression"], mvc(genes, output.embeddings[:, None]))
    turned, plain = (copy.deepcopy(model) for _ in range(2))
    plain.cls.label_predictions.predictions.label_decoders["donor"].decoder[0].coefficient = -1.0
    for one in (turned, plain):
        one(ids, mask).logits["donor"].square().sum().backward()
    first = next(key for key, p in turned.named_parameters() if p.requires_grad)
    gradients = [dict(one.named_parameters())[first].grad for one in (turned, plain)]
    assert torch.allclose(gradients[0], -0.5 * gradients[1], atol=1e-6) and gradients[1].abs().sum() > 0


def pairs(mask, hidden=(3, 5)):
    """The mask (B, L, L) that keeps masked positions from being seen, except by themselves."""
    rows, length = mask.shape
    masked = torch.zeros(rows, length, dtype=torch.bool)
    masked[:, list(hidden)] = True
    real = mask.bool()
    seen = real[:, :, None] & (real & ~masked)[:, None, :]
    return (seen | torch.diag_embed(real)).to(torch.int64)


@pytest.mark.parametrize("attention", ["torch", "classic"])
@pytest.mark.parametrize("name", EXACT)
def test_masked_positions_can_be_hidden_from_the_others(name, attention):
    model = model_of(name, attention=attention, classifier_pooling="mean")
    ids, mask = batch()
    other = ids.clone()
    other[:, 0, 3], other[:, 1, 5] = 9.0, 2.5
    rest = [place for place in range(12) if place not in (3, 5)]
    with torch.no_grad():
        first, second = model(ids, pairs(mask)), model(other, pairs(mask))
        for row in range(len(ids)):
            length = int(mask[row].sum())
            alone = model(ids[row : row + 1, :, :length], pairs(mask)[row : row + 1, :length, :length])
            same(scores_of_row(alone, 0, length), scores_of_row(first, row, length))
    for key in ("genes_token_scores", "expressions_regression"):
        assert torch.allclose(first.logits[key][:, rest], second.logits[key][:, rest], atol=1e-5)
        assert not torch.allclose(first.logits[key][:, 3], second.logits[key][:, 3], atol=1e-3)
    assert torch.isfinite(first.last_hidden_state).all()


@pytest.mark.parametrize("name", [name for name in NAMES if name not in EXACT])
def test_hiding_single_pairs_from_approximated_attention_is_refused(name):
    ids, mask = batch()
    with pytest.raises(ConfigError, match=f"{name} approximates attention"):
        model_of(name)(ids, pairs(mask))


@pytest.mark.parametrize("name", NAMES)
def test_a_cell_of_nothing_but_padding_stays_finite(name):
    model = model_of(name).train()
    ids, mask = batch()
    mask[2] = 0
    output = model(ids, mask)
    assert all(torch.isfinite(value).all() for value in output.logits.values())
    sum(value.square().mean() for value in output.logits.values()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", NAMES)
def test_half_precision_stays_close(name, half):
    torch.manual_seed(0)
    model = build_model({"model_type": name, **SIZES, **OWN.get(name, {})}, FIELDS, LABELS).eval()
    ids, mask = batch()
    with torch.no_grad():
        exact = model(ids, mask)
        with torch.autocast("cpu", dtype=half):
            mixed = model(ids, mask)
        whole = model.to(half)(ids, mask)
    for row in range(len(ids)):
        length = int(mask[row].sum())
        for other in (mixed, whole):
            got = {key: value.float() for key, value in scores_of_row(other, row, length).items()}
            same(scores_of_row(exact, row, length), got, 0.06)


@pytest.mark.parametrize("name", NAMES)
def test_attention_weights_are_returned_where_there_are_any(name):
    ids, mask = batch()
    if name not in EXACT:
        with pytest.raises(ValueError, match="approximated"):
            model_of(name)(ids, mask, output_attentions=True)
        return
    with pytest.raises(ValueError, match="attention: null"):
        model_of(name)(ids, mask, output_attentions=True)
    model, fused = model_of(name, attention=None), model_of(name)
    with torch.no_grad():
        output = model(ids, mask, output_attentions=True)
        other = fused(ids, mask)
    for row in range(len(ids)):
        length = int(mask[row].sum())
        same(scores_of_row(output, row, length), scores_of_row(other, row, length))
    memory = 2 if name == "scllama" else 0
    assert [weights.shape for weights in output.attentions] == [(4, 4, 12 + memory, 12 + memory)] * 3
    assert torch.allclose(output.attentions[1].sum(-1), torch.ones(()), atol=1e-5)
    assert output.attentions[0][3, :, 0, 9:12].abs().max() == 0


@pytest.mark.parametrize(
    ("name", "first"),
    [("scbert", 4), ("scperformer", 4), ("scnystromformer", 4), ("scmodernbert", 4), ("scllama", 3)],
)
def test_hidden_states_end_with_the_last(name, first):
    ids, mask = batch()
    output = model_of(name)(ids, mask, output_hidden_states=True)
    assert len(output.hidden_states) == first
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)
    assert all(state.shape == (4, 12, 32) for state in output.hidden_states)
    assert model_of(name)(ids, mask).hidden_states is None


@pytest.mark.parametrize("name", NAMES)
def test_freezing_the_encoder_leaves_embeddings_and_heads_alone(name):
    import re

    model = model_of(name)
    names = [key for key, _ in model.named_parameters() if re.search(model.encoder_pattern, key)]
    assert len(names) > 3 * 3
    assert not [key for key in names if "embeddings" in key or "pooler" in key or key.startswith("cls")]
    left = [key for key, _ in model.named_parameters() if key not in names and not key.startswith("cls.")]
    assert all("embeddings" in key or "pooler" in key for key in left), left


def test_initial_weights_are_as_documented():
    for name in NAMES:
        torch.manual_seed(0)
        wide = {**SIZES, "hidden_size": 64, **OWN.get(name, {})}
        model = build_model({"model_type": name, **wide}, [{**FIELDS[0], "vocab_size": 3000}, FIELDS[1]], LABELS)
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                assert (parameter == 0).all(), (name, key)
            elif "orm.weight" in key or "norm.weight" in key or key.endswith("scale"):
                assert (parameter == 1).all(), (name, key)
            elif "hidden_activation_fn" not in key and parameter.numel() > 500:
                rows = parameter[3:] if key.endswith("embeddings.weight") else parameter
                uniform = name == "scllama" and not key.endswith("embeddings.weight")
                expected = (3 * parameter.shape[1]) ** -0.5 if uniform else 0.02
                if name == "scmodernbert":
                    assert parameter.abs().max() <= 0.04
                    expected *= 0.88  # a normal distribution cut at two standard deviations
                assert rows.std().item() == pytest.approx(expected, rel=0.12), (name, key)
        assert (model.backbone.embeddings.genes_embeddings.weight[2] == 0).all()
