"""Every YAML block of the document that describes the configuration, read from the file that $BMFM_SEED_FILE names."""

import re

import pytest
import yaml

from bmfm_pipeline.config import RunConfig, compose, list_entries
from bmfm_pipeline.config.targets import DATA_MODULE_TARGETS
from bmfm_pipeline.errors import ConfigError

# Written in a block and decided elsewhere: the tokenizer, the environment.
DECIDED_ELSEWHERE = {"model.pad_token_id", "task.default_root_dir"}
LABELS = "label_columns:\n  - label_column_name: celltype\n    is_stratification_label: true\n"


def stands_for(block: str) -> str | None:
    """The dataset that the data module of a block stands for."""
    module = yaml.safe_load(block).get("data_module") or {}
    return DATA_MODULE_TARGETS.get(module.get("_target_"))


def leaves(node, prefix=""):
    """Dotted name and value of every leaf, without Hydra's own keys."""
    pairs = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else None
    if pairs is None:
        yield prefix, node
        return
    for name, value in pairs:
        if not str(name).startswith("_"):
            yield from leaves(value, f"{prefix}.{name}" if prefix else str(name))


def at(plain, name: str):
    for part in name.split("."):
        plain = plain[int(part)] if isinstance(plain, list) else plain[part]
    return plain


def mended(error: ConfigError) -> str:
    """The override that a refusal recommends."""
    found = re.search(r"set ([\w.]+=\w+)", str(error))
    assert found, f"says nothing to change: {error}"
    return found[1]


def test_there_are_blocks(seed_blocks):
    assert len(seed_blocks) > 5


def test_a_block_composes_with_all_it_says_or_is_refused_with_what_to_change(seed_block, complete):
    folder = complete(seed_block)
    absent = stands_for(seed_block)
    if absent is not None and absent not in {entry.name for entry in list_entries()}:
        with pytest.raises(ConfigError) as refusal:
            compose("case", config_dir=folder)
        for part in (absent, "catalogue", "source_h5ad_file_name"):
            assert part in str(refusal.value)
        return
    try:
        run = compose("case", config_dir=folder)
    except ConfigError as refusal:
        run = compose("case", [mended(refusal)], folder)
    plain = run.model_dump(mode="json")
    assert RunConfig.model_validate(plain) == run
    # Files of studies are prepared in the workspace, and their keys stand where those of other data do.
    studies = ("data_module.transform_datasets", "data_module.dataset_kwargs.")
    moved = studies if run.data_module.transform_kwargs.files else ()
    for name, value in leaves(yaml.safe_load(seed_block)):
        if name not in DECIDED_ELSEWHERE and not name.startswith(moved):
            expected = float(value) if name.endswith("layer_norm_eps") else value
            assert at(plain, name) == expected, name


@pytest.fixture
def whole(seed_blocks) -> dict[str, str]:
    """The blocks that belong together: one of each section, for training on labels and masks."""
    chosen: dict[str, str] = {}
    for block in seed_blocks:
        for section, content in yaml.safe_load(block).items():
            fits = not isinstance(content, dict) or (
                content.get("collation_strategy", "multitask") == "multitask"
                and not str(content.get("_target_")).endswith("TestTaskConfig")
            )
            if fits:
                chosen.setdefault(section, block)
    return chosen


def test_the_blocks_that_belong_together_are_refused_for_what_they_contradict_and_then_compose(whole, complete):
    assert {"seed", "fields", "data_module", "model", "trainer", "task"} <= set(whole)
    folder = complete(*dict.fromkeys(whole.values()), LABELS)
    with pytest.raises(
        ConfigError, match=r"trainer\.losses\.\d+: .* needs that field to be masked.*or remove this loss"
    ) as refusal:
        compose("case", config_dir=folder)
    run = compose("case", [mended(refusal.value)], folder)
    assert run.dataset == "zheng68k"
    assert run.training_stage == "pretrain" and run.predicts_labels
    assert {entry.get("field_name") or entry["label_column_name"] for entry in run.trainer.losses} == {
        "genes",
        "expressions",
        "celltype",
    }
    heads = {field.field_name: set(field.decode_modes) for field in run.fields}
    assert heads == {"genes": {"token_scores"}, "expressions": {"regression", "is_zero"}}
    assert run.preset_used is None, "sizes that were written are kept"
    assert run.data_module.data_dir.startswith("${oc.env:"), "no variable is needed yet"


def test_masking_the_field_in_its_own_block_mends_it_too(whole, complete):
    fields = yaml.safe_load(whole["fields"])
    for field in fields["fields"]:
        field["is_masked"] = True
    others = [block for section, block in whole.items() if section != "fields"]
    assert compose("case", config_dir=complete(*others, yaml.safe_dump(fields), LABELS)).fields[0].is_masked


def test_removing_the_loss_mends_it_too(whole, complete):
    trainer = yaml.safe_load(whole["trainer"])
    masked = {field["field_name"] for field in yaml.safe_load(whole["fields"])["fields"] if field["is_masked"]}
    kept = [entry for entry in trainer["trainer"]["losses"] if entry.get("field_name") in masked | {None}]
    trainer["trainer"]["losses"] = kept
    others = [block for section, block in whole.items() if section != "trainer"]
    run = compose("case", config_dir=complete(*others, yaml.safe_dump(trainer), LABELS))
    assert len(run.trainer.losses) == len(kept)


def test_the_whole_config_can_turn_to_fine_tuning_by_an_override(whole, complete):
    """Losses on masks are refused then; with the label's alone it fine-tunes."""
    folder = complete(*dict.fromkeys(whole.values()), LABELS)
    with pytest.raises(ConfigError, match=r"needs .*masked"):
        compose("case", ["data_module.mlm=false", "fields.0.is_masked=true"], folder)
    run = compose("case", ["data_module.mlm=false", "trainer.losses=null"], folder)
    assert run.training_stage == "finetune"
    assert [entry["label_column_name"] for entry in run.trainer.losses] == ["celltype"]


def test_a_generic_file_needs_only_what_its_block_says(seed_blocks, complete):
    generic = next(
        block for block in seed_blocks if "data_module" in yaml.safe_load(block) and stands_for(block) is None
    )
    run = compose("case", config_dir=complete(generic))
    said = yaml.safe_load(generic)["data_module"]
    assert run.dataset is None
    assert [label.label_column_name for label in run.label_columns] == said["dataset_kwargs"]["label_columns"]
    assert run.key_view("finetune")
    # The second time, with the processed file.
    again = compose(
        "case", ["data_module.transform_datasets=false", "~data_module.transform_kwargs"], complete(generic)
    )
    assert again.data_module.dataset_kwargs.processed_data_source == said["dataset_kwargs"]["processed_data_source"]
