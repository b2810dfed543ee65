"""SCBert: shapes and keys, padding and neighbours, scoring only some positions, heads, precision, initialisation."""

import pytest
import torch
from backbone_cases import check_positions
from torch.utils._python_dispatch import TorchDispatchMode

from bmfm_pipeline.errors import ConfigError
from bmfm_pipeline.models import SCBertConfig, build_model, pool

SIZES = {
    "model_type": "scbert",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def fields(vocabulary=40, **expressions):
    return [
        {
            "field_name": "genes",
            "vocab_size": vocabulary,
            "num_special_tokens": 5,
            "decode_modes": {"token_scores": {}},
        },
        {
            "field_name": "expressions",
            "vocab_size": 15,
            "num_special_tokens": 5,
            "is_masked": True,
            "decode_modes": ["token_scores", "regression", "is_zero"],
            **expressions,
        },
    ]


def labels(**extra):
    return [{"label_column_name": "celltype", "n_unique_values": 7, **extra}]


def model_of(field_list=None, label_list=None, seed=0, **sizes):
    torch.manual_seed(seed)
    return build_model(SIZES | sizes, field_list or fields(), labels() if label_list is None else label_list).eval()


def batch(rows=4, length=12, vocabulary=40, padded=True, seed=1):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.stack(
        [
            torch.randint(5, vocabulary, (rows, length), generator=generator),
            torch.randint(5, 15, (rows, length), generator=generator),
        ],
        dim=1,
    )
    mask = torch.ones(rows, length, dtype=torch.int64)
    if padded:
        for row in range(1, rows):
            ids[row, :, length - row :] = 2
            mask[row, length - row :] = 0
    return ids, mask


MVC_WCED = {
    "token_scores": {},
    "mvc_regression": {"query_field": "genes"},
    "mvc_is_zero": {},
    "wced": {"vocab_field": "genes"},
}


def test_positions_give_the_scores_of_the_full_pass():
    model = model_of(fields(decode_modes=MVC_WCED))
    ids, mask = batch()
    check_positions(model, ids, mask)


def test_fields_without_positions_are_not_scored():
    model = model_of()
    ids, mask = batch()
    assert list(model(ids, mask, positions={"genes": torch.tensor([1])}).logits) == ["genes_token_scores", "celltype"]
    nothing = model(ids, mask, positions={"genes": torch.tensor([], dtype=torch.int64)}).logits["genes_token_scores"]
    assert nothing.shape == (0, 40)


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for item in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(item, torch.Tensor):
                self.elements = max(self.elements, item.numel())
        return out


def test_fifty_thousand_genes_never_meet_every_position():
    from bmfm_pipeline.objectives import build_objectives

    vocabulary, rows, length, masked = 50_000, 4, 256, 60
    model = model_of(fields(vocabulary)).train()
    ids, _ = batch(rows, length, vocabulary, padded=False)
    targets = torch.full((rows, length), -100)
    chosen = torch.randperm(rows * length)[:masked]
    targets.view(-1)[chosen] = ids[:, 0].reshape(-1)[chosen]
    objectives = build_objectives([{"field_name": "genes", "name": "cross_entropy"}], fields(vocabulary))
    with LargestTensor() as seen:
        positions = objectives.positions({"genes": targets})
        output = model(ids, positions=positions)
        objectives.compute(output.logits, {"genes": targets}, positions).total.backward()
    assert model.backbone.embeddings.genes_embeddings.weight.grad is not None
    # The scores of the masked positions are the largest thing there is; all positions would be 17 times that.
    assert seen.elements == vocabulary * masked


@pytest.mark.parametrize("attention", ["torch", None])
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_neighbours_and_padding_do_not_matter(attention, pooling):
    model = model_of(attention=attention, classifier_pooling=pooling)
    ids, mask = batch()
    changed = ids.clone()
    changed[1:, 0, :] = 39  # other cells
    changed[0, :, :] = ids[0]
    longer = torch.nn.functional.pad(ids, (0, 20), value=7)  # padding of another length, holding real tokens' ids
    longer_mask = torch.nn.functional.pad(mask, (0, 20))
    with torch.no_grad():
        base, other, long = model(ids, mask), model(changed, mask), model(longer, longer_mask)
    for key in base.logits:
        assert torch.allclose(base.logits[key][0], other.logits[key][0], atol=1e-5), key
        for row in range(len(ids)):
            real = slice(0, int(mask[row].sum())) if base.logits[key].dim() == 3 else slice(None)
            assert torch.allclose(base.logits[key][row][real], long.logits[key][row][real], atol=1e-5), (key, row)
    for method in ("first_token", "pooling_layer", "mean_pooling", 3, ["first_token", 2]):
        assert torch.allclose(pool(base, mask, method), pool(long, longer_mask, method), atol=1e-5), method


def test_fused_and_classic_attention_agree_and_only_classic_returns_weights():
    fused, classic = model_of(), model_of(attention=None)
    ids, mask = batch()
    square = mask.unsqueeze(1) * mask.unsqueeze(2)
    square[:, :, 3] = 0  # nobody sees position 3
    square[:, 3, 3] = 1
    for seen in (mask, square):
        a, b = fused(ids, seen), classic(ids, seen, output_attentions=True)
        real = mask.bool()
        assert torch.allclose(a.last_hidden_state[real], b.last_hidden_state[real], atol=1e-5)
    assert b.attentions[0].shape == (4, 4, 12, 12)
    assert b.attentions[0][0, :, 0, 3].abs().max() == 0
    with pytest.raises(ValueError, match="attention: null"):
        fused(ids, mask, output_attentions=True)


def test_a_cell_of_nothing_but_padding_stays_finite():
    ids, mask = batch()
    mask[2] = 0
    for attention in ("torch", None):
        output = model_of(attention=attention)(ids, mask)
        assert all(torch.isfinite(value).all() for value in output.logits.values())
        assert torch.isfinite(pool(output, mask, "mean_pooling")).all()


@pytest.mark.parametrize("kind", ["mlp", "mlp_with_special_token_embedding", "scale_adapt", None])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_half_precision_stays_close(kind, half):
    kwargs = {"kind": kind} if kind else None
    if kind == "scale_adapt":
        kwargs |= {"n_sin_basis": 4, "basis_scale": 0.1}
    model = model_of(
        fields(
            tokenization_strategy="continuous_value_encoder",
            encoder_kwargs=kwargs,
            decode_modes=["regression", "is_zero"],
        )
    )
    ids, mask = batch()
    ids = ids.float()
    ids[:, 1] = ids[:, 1] / 3
    ids[:, 1, 0], ids[:, 1, 4], ids[:, 1, 5] = -4.0, 0.0, -5.0
    with torch.no_grad():
        exact = model(ids, mask)
        with torch.autocast("cpu", dtype=half):
            mixed = model(ids, mask)
        whole = model.to(half)(ids, mask)
    for key, value in exact.logits.items():
        for other in (mixed, whole):
            assert torch.allclose(value, other.logits[key].float(), atol=0.05, rtol=0.05), key


def test_zero_and_special_values_have_their_own_vectors():
    model = model_of(fields(tokenization_strategy="continuous_value_encoder", decode_modes=["regression"]))
    embeddings = model.backbone.embeddings
    table = embeddings.expressions_embeddings.special_token_embeddings
    assert table.num_embeddings == 6  # five special tokens and exact zero
    with torch.no_grad():
        table.weight[5] += 1.0
        zero, tiny, mask_token, pad = embeddings.embed_field("expressions", torch.tensor([0.0, 1e-6, -5.0, -3.0]))
    assert not torch.allclose(zero, tiny, atol=1e-3)
    assert not torch.allclose(mask_token, tiny, atol=1e-4)
    assert torch.equal(pad, embeddings.expressions_embeddings.dense_2.bias)  # the pad row is zero


def test_initial_weights_are_as_documented():
    model = model_of(fields(2000), initializer_range=0.05, position_embedding_type="sinusoidal", hidden_size=64)
    for name, parameter in model.named_parameters():
        if "LayerNorm.weight" in name:
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "position_embeddings" in name:
            assert (
                not parameter.requires_grad
                and parameter[0, 1] == 1
                and parameter[1, 0] == pytest.approx(0.841471, abs=1e-6)
            )
        else:
            rows = parameter[3:] if "embeddings" in name else parameter
            assert rows.std().item() == pytest.approx(0.05, rel=0.15), name
            assert abs(rows.mean().item()) < 0.01, name
    assert (model.backbone.embeddings.genes_embeddings.weight[2] == 0).all()
    twice = model_of(seed=3), model_of(seed=3)
    assert all(torch.equal(a, b) for a, b in zip(twice[0].parameters(), twice[1].parameters(), strict=True))


def test_gradient_reversal_turns_the_encoder_gradient_around():
    ids, mask = batch()

    def gradients(coefficient):
        model = model_of(label_list=labels(gradient_reversal_coefficient=coefficient))
        model(ids, mask).logits["celltype"].square().sum().backward()
        head = [p.grad for name, p in model.named_parameters() if "label_decoders" in name and name.endswith("weight")]
        return model.backbone.pooler.dense.weight.grad, head[0]

    (plain, plain_head), (turned, turned_head) = gradients(None), gradients(0.5)
    assert torch.allclose(turned, -0.5 * plain, atol=1e-7) and plain.abs().sum() > 0
    assert torch.allclose(turned_head, plain_head)


def test_task_group_and_depth_are_real():
    columns = [
        {"label_column_name": "a", "n_unique_values": 3, "task_group": "blood"},
        {"label_column_name": "b", "n_unique_values": 4, "task_group": "blood", "classifier_depth": 2},
        {"label_column_name": "c", "n_unique_values": 2},
    ]
    model = model_of(label_list=columns)
    names = [name for name, _ in model.named_parameters() if "label_predictions" in name]
    assert sum("task_groups.blood" in name for name in names) == 2  # one shared Linear
    assert [name for name in names if ".b.decoder" in name and name.endswith("weight")] == [
        "cls.label_predictions.predictions.label_decoders.b.decoder.0.weight",
        "cls.label_predictions.predictions.label_decoders.b.decoder.3.weight",
    ]
    ids, mask = batch()
    model(ids, mask).logits["a"].sum().backward()
    parameters = dict(model.named_parameters())
    shared = parameters["cls.label_predictions.predictions.task_groups.blood.0.weight"]
    assert shared.grad.abs().sum() > 0
    assert parameters["cls.label_predictions.predictions.label_decoders.c.decoder.weight"].grad is None


@pytest.mark.parametrize("style", ["inner product", "concat query", "sum query"])
def test_gene_queries_in_their_three_forms(style):
    modes = {"mvc_regression": {"query_field": "genes", "arch_style": style}}
    model = model_of(fields(decode_modes=modes), [])
    ids, mask = batch()
    picked = torch.tensor([2, 30])
    full = model(ids, mask).logits["expressions_mvc_regression"]
    some = model(ids, mask, positions={"expressions": picked}).logits["expressions_mvc_regression"]
    assert full.shape == (4, 12, 1) and torch.allclose(full.flatten(0, 1)[picked], some, atol=1e-6)
    assert not torch.allclose(full[0, 1], full[0, 2]) and not torch.allclose(full[0, 0], full[1, 0])
    full.square().sum().backward()
    head = model.cls.predictions.predictions.head("expressions_mvc_regression")
    assert all(p.grad.abs().sum() > 0 for p in head.parameters() if p.requires_grad)


def test_decode_from_reads_that_position():
    model = model_of(label_list=labels(decode_from=3))
    ids, mask = batch()
    output = model(ids, mask)
    decoder = model.cls.label_predictions.predictions.label_decoders["celltype"].decoder
    assert torch.allclose(output.logits["celltype"], decoder(output.last_hidden_state[:, 3]))
    with pytest.raises(ValueError, match="position 3"):
        model(ids[:, :, :3], mask[:, :3])


def test_gradient_checkpointing_gives_the_same_gradients():
    ids, mask = batch()
    plain, saved = model_of().train(), model_of().train()
    saved.gradient_checkpointing_enable()
    for model in (plain, saved):
        model(ids, mask).logits["celltype"].square().sum().backward()
    assert torch.allclose(
        plain.backbone.encoder.layer[0].output.dense.weight.grad,
        saved.backbone.encoder.layer[0].output.dense.weight.grad,
        atol=1e-6,
    )


def test_inputs_embeds_take_the_place_of_the_embedding_layer():
    model = model_of()
    ids, mask = batch()
    embedded = model.backbone.embeddings(ids)
    assert torch.allclose(
        model(ids, mask).logits["celltype"], model(None, mask, inputs_embeds=embedded).logits["celltype"]
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model_type": "bert"}, "unknown"),
        ({"hiden_size": 32}, "did you mean 'hidden_size'"),
        ({"num_attention_heads": 5}, "not divisible"),
        ({"attention": "sparse"}, "'torch', 'flex', 'classic', null"),
        ({"position_embedding_type": "rotary"}, "absolute"),
    ],
)
def test_impossible_models_are_refused(change, words):
    with pytest.raises(ConfigError, match=words):
        build_model(SIZES | change, fields(), labels())


@pytest.mark.parametrize(
    ("field_list", "label_list", "words"),
    [
        (fields(None), [], "vocab_size is None"),
        (fields(decode_modes=["tokens"]), [], "unknown \\['tokens'\\]"),
        (fields(decode_modes={"wced": {"vocab_field": "proteins"}}), [], "vocab_field is 'proteins'"),
        (
            fields(decode_modes={"mvc_regression": {"arch_style": "outer"}}),
            [],
            "arch_style is 'outer'; there are 'inner product'",
        ),
        (
            fields(decode_modes={"mvc_is_zero": {"arch": "sum query"}}),
            [],
            "unknown arch; there are query_field and arch_style",
        ),
        (fields() + fields()[:1], [], "genes listed more than once"),
        (
            fields(encoder_kwargs={"kind": "cnn"}, tokenization_strategy="continuous_value_encoder", decode_modes=[]),
            [],
            "'cnn'",
        ),
        (
            fields(
                encoder_kwargs={"kind": "mlp", "depth": 2},
                tokenization_strategy="continuous_value_encoder",
                decode_modes=[],
            ),
            [],
            "depth",
        ),
        (fields(), [{"label_column_name": "x"}], "number of classes is unknown"),
        (fields(), labels(classifier_depth=3), "classifier_depth is 3"),
        (fields(), [{"label_column_name": "genes_token_scores", "n_unique_values": 2}], "rename the column"),
    ],
)
def test_impossible_fields_and_labels_are_refused(field_list, label_list, words):
    with pytest.raises(ConfigError, match=words):
        build_model(SIZES, field_list, label_list)


def test_wrong_shapes_are_named():
    model = model_of(position_embedding_type="absolute", max_position_embeddings=8)
    ids, mask = batch()
    with pytest.raises(ValueError, match="max_position_embeddings is 8"):
        model(ids, mask)
    with pytest.raises(ValueError, match=r"\(batch, 2, length\)"):
        model(ids[:, :1, :8], mask[:, :8])
    with pytest.raises(ConfigError, match="pooling_layer"):
        pool(model(ids[:, :, :8], mask[:, :8]), mask[:, :8], "max")


def test_a_position_is_the_cell_s_own_whatever_the_length_of_the_batch():
    ids, mask = batch()
    output = model_of()(ids, mask)
    sizes = mask.sum(dim=1)
    last = pool(output, mask, -1)
    assert torch.equal(last, output.last_hidden_state[torch.arange(len(ids)), sizes - 1])
    tenth = pool(output, mask, 9)
    assert torch.equal(torch.isnan(tenth).all(dim=1), sizes <= 9) and bool((sizes <= 9).any())
    assert torch.equal(tenth[sizes > 9], output.last_hidden_state[sizes > 9, 9])
    assert torch.isnan(pool(output, mask, 500)).all()


def test_configuration_survives_json(tmp_path):
    config = model_of().config
    config.save_pretrained(tmp_path)
    again = SCBertConfig.from_pretrained(tmp_path)
    assert again.model_fields == config.model_fields and again.model_labels == config.model_labels
    assert again.hidden_size == 32 and again.intermediate_size == 48
