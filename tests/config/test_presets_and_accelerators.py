"""What changes on a machine without an accelerator: only what nobody wrote, and never in silence."""

import subprocess
import sys

import pytest

from bmfm_pipeline.config import compose, settle_execution
from bmfm_pipeline.config.tasks import TrainingTaskConfig
from bmfm_pipeline.errors import ConfigError

TRAININGS = ("pre_train_config", "fine_tune_train_config")
ON_PRETRAINING = "defaults: [pre_train_config, _self_]\n"


def sizes(run) -> tuple[int, int, int, int]:
    model = run.model
    return model.hidden_size, model.num_hidden_layers, model.num_attention_heads, model.intermediate_size


FULL = (768, 12, 12, 3072)


@pytest.mark.usefixtures("without_accelerator")
class TestWithoutAnAccelerator:
    @pytest.mark.parametrize("name", TRAININGS)
    def test_a_config_that_nobody_sized_gets_the_laptop_preset_and_says_so(self, name):
        run = compose(name)
        assert run.preset_used == "laptop"
        assert run.model.hidden_size < 768 and run.task.max_steps > 0
        note = next(note for note in run.notes if note.startswith("preset laptop"))
        for key in (
            "no accelerator is usable",
            f"model.hidden_size={run.model.hidden_size}",
            f"task.max_steps={run.task.max_steps}",
        ):
            assert key in note

    @pytest.mark.parametrize(
        "key", ["hidden_size=60", "num_hidden_layers=3", "num_attention_heads=6", "intermediate_size=99"]
    )
    def test_one_size_that_is_written_keeps_the_preset_away(self, key):
        name, value = key.split("=")
        run = compose("pre_train_config", [f"model.{key}"])
        expected = dict(
            zip(("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"), FULL, strict=True)
        )
        expected[name] = int(value)
        assert sizes(run) == tuple(expected.values())
        assert run.preset_used is None and run.task.max_steps == -1

    def test_sizes_written_in_a_file_are_kept_and_a_big_model_is_mentioned(self, tmp_path, write):
        write(tmp_path, "mine", ON_PRETRAINING + "model: {hidden_size: 768, num_hidden_layers: 12}\n")
        run = compose("mine", config_dir=tmp_path)
        assert sizes(run) == FULL
        assert any("12 layers of 768" in note and "slow" in note for note in run.notes)

    def test_a_small_model_that_was_written_is_not_mentioned(self):
        overrides = ["model.hidden_size=64", "model.num_hidden_layers=1", "model.num_attention_heads=2"]
        assert compose("pre_train_config", overrides).notes == []

    def test_sizes_written_in_a_file_that_another_file_builds_on_are_kept(self, tmp_path, write):
        write(tmp_path, "lab", ON_PRETRAINING + "model: {num_hidden_layers: 3}\n")
        write(tmp_path, "mine", "defaults: [lab, _self_]\n")
        assert compose("mine", config_dir=tmp_path).model.num_hidden_layers == 3

    def test_sizes_written_in_a_group_are_kept(self, tmp_path, write):
        write(tmp_path, "model/lab", "hidden_size: 60\n")
        write(tmp_path, "mine", "defaults: [pre_train_config, {override /model: lab}, _self_]\n")
        assert compose("mine", config_dir=tmp_path).model.hidden_size == 60
        assert compose("pre_train_config", ["model=lab"], tmp_path).model.hidden_size == 60

    @pytest.mark.parametrize("name", ["scbert", "performer", "nystromformer", "modernbert", "llama"])
    def test_a_packaged_model_that_was_chosen_is_a_choice_of_network_not_of_size(self, name):
        run = compose("pre_train_config", [f"model={name}"])
        assert run.preset_used == "laptop" and sizes(run) == (64, 1, 1, 128)
        assert run.model.model_type.endswith(name)

    def test_a_packaged_model_is_chosen_in_a_file_too_and_has_its_own_size_where_one_is_written(self, tmp_path, write):
        write(tmp_path, "mine", "defaults: [pre_train_config, {override /model: modernbert}, _self_]\n")
        assert sizes(compose("mine", config_dir=tmp_path)) == (64, 1, 1, 128)
        assert sizes(compose("mine", ["preset=none"], tmp_path)) == (768, 22, 12, 1152)
        assert sizes(compose("mine", ["model.num_hidden_layers=5"], tmp_path)) == (768, 5, 12, 1152)

    def test_a_group_that_was_chosen_is_kept_whole(self):
        run = compose("pre_train_config", ["trainer=finetune"])
        assert (run.trainer.learning_rate, run.trainer.warmup_steps) == (5e-5, 100)
        assert run.preset_used == "laptop"

    def test_a_section_given_whole_is_kept(self):
        assert compose("pre_train_config", ["model={hidden_size: 24}"]).model.hidden_size == 24

    @pytest.mark.parametrize(
        "override", ["model.checkpoint=/m", "model.hidden_dropout_prob=0.2", "model.attention=classic"]
    )
    def test_keys_of_the_model_that_are_no_size_leave_the_preset_on(self, override):
        assert compose("fine_tune_train_config", [override]).preset_used == "laptop"

    def test_steps_and_rates_that_are_written_are_kept_beside_the_preset(self):
        run = compose("pre_train_config", ["task.max_steps=7", "trainer.learning_rate=0.5"])
        assert run.preset_used == "laptop"
        assert (run.task.max_steps, run.trainer.learning_rate) == (7, 0.5)
        assert run.trainer.warmup_steps == 30

    @pytest.mark.parametrize("override", ["task.max_epochs=3", "task.max_time='00:02:00:00'"])
    def test_epochs_or_a_time_that_are_written_are_not_cut_short(self, override):
        run = compose("pre_train_config", [override])
        assert run.task.max_steps == -1
        if "epochs" in override:
            assert run.task.max_epochs == 3

    def test_a_key_that_was_removed_stays_removed(self):
        assert compose("pre_train_config", ["~trainer.warmup_steps"]).trainer.warmup_steps == 0

    def test_fine_tuning_has_steps_of_its_own(self):
        pretrain, finetune = (compose(name) for name in TRAININGS)
        assert pretrain.task.max_steps != finetune.task.max_steps

    def test_multitask_with_masks_is_pretraining_also_where_mlm_is_left_open(self):
        steps = compose("pre_train_config", ["data_module=base_language_modeling"]).task.max_steps
        for more in ([], ["data_module.mlm=null"]):
            assert compose("pre_train_config", ["data_module=base_multi_task", *more]).task.max_steps == steps
        run = compose("pre_train_config", ["data_module=base_multi_task", "data_module.mlm=false"])
        assert run.task.max_steps == compose("fine_tune_train_config", ["data_module=base_seq_cls"]).task.max_steps

    @pytest.mark.parametrize("name", TRAININGS)
    def test_whole_cells_are_read_as_numbers_and_the_note_says_so(self, name):
        run = compose(name)
        assert [field.continuous for field in run.fields] == [False, True]
        assert run.data_module.sqrt_normalize_transform and run.model.linear_path and run.model.cell_summary
        assert any("expressions as numbers" in note for note in run.notes)

    @pytest.mark.parametrize(
        "override",
        [
            "fields=genes_masked_expressions_masked",
            "fields.1.is_masked=true",
            "data_module.log_normalize_transform=true",
            "data_module.rda_transform=equal",
            "data_module.transform_kwargs.input_values=any",
            "data_module.transform_kwargs.transforms=[{transform_name: TPMNormalizationTransform, transform_args: {gtf_file: a.gtf}}]",
            "trainer.losses=[{field_name: expressions, name: focal}]",
        ],
    )
    def test_who_says_how_values_are_read_gets_nothing_of_that(self, override):
        run = compose("pre_train_config", [override])
        assert run.preset_used == "laptop" and not any(field.continuous for field in run.fields)
        assert not (run.data_module.sqrt_normalize_transform or run.model.linear_path or run.model.cell_summary)
        assert run.data_module.max_length == 512

    @pytest.mark.parametrize("name", TRAININGS)
    def test_sequences_are_read_letter_by_letter_through_convolutions(self, name):
        run = compose(name, ["dataset=core_promoter"])
        sequences = run.data_module.sequences
        assert sequences.vocabulary.kind == "nucleotide" and run.model.linear_path
        assert run.model.convolution_layers > 0 and run.model.classifier_pooling == "max"
        assert run.model.position_embedding_type and run.model.max_position_embeddings >= run.data_module.max_length
        assert compose(name).model.convolution_layers == 0, "cells are not sequences"

    @pytest.mark.parametrize("written", ["kind=bpe", "size=1000"])
    def test_the_vocabulary_of_sequences_that_is_written_is_kept(self, written):
        run = compose(
            "fine_tune_train_config", ["dataset=core_promoter", f"data_module.sequences.vocabulary.{written}"]
        )
        assert run.preset_used == "laptop" and run.data_module.sequences.vocabulary.kind == "bpe"
        assert not run.model.linear_path, "it counts words of letters"

    def test_it_can_be_turned_off(self):
        run = compose("pre_train_config", ["preset=none"])
        assert (sizes(run), run.preset_used, run.notes) == (FULL, None, [])

    def test_a_config_of_ones_own_without_a_model_gets_it_too(self, tmp_path, write):
        assert compose("mine", config_dir=write(tmp_path, "mine", "seed: {seed_value: 1}\n")).preset_used == "laptop"

    @pytest.mark.parametrize("name", ["test_config", "predict_config"])
    def test_tasks_that_do_not_train_are_left_alone(self, name):
        run = compose(name)
        assert (run.preset_used, run.notes) == (None, [])

    def test_the_file_of_the_run_tells_the_preset(self):
        plain = compose("pre_train_config").model_dump(mode="json")
        assert plain["preset_used"] == "laptop" and plain["notes"]


@pytest.mark.usefixtures("with_accelerator")
class TestWithAnAccelerator:
    @pytest.mark.parametrize("name", TRAININGS)
    def test_there_is_no_preset_and_no_note(self, name):
        run = compose(name)
        assert (sizes(run), run.preset_used, run.notes) == (FULL, None, [])

    def test_the_preset_can_be_asked_for_and_still_changes_no_key_that_is_written(self):
        run = compose("pre_train_config", ["preset=laptop", "model.hidden_size=64", "task.max_steps=9"])
        assert (run.preset_used, run.model.hidden_size, run.model.num_hidden_layers, run.task.max_steps) == (
            "laptop",
            64,
            1,
            9,
        )
        assert any(note.startswith("preset laptop: asked for") for note in run.notes)

    def test_an_unknown_preset_lists_those_there_are(self):
        with pytest.raises(ConfigError, match=r"preset: must be one of auto, none, laptop \(found 'desktop'\)"):
            compose("pre_train_config", ["preset=desktop"])


class TestSizesOfACheckpoint:
    @pytest.mark.parametrize("machine", ["with_accelerator", "without_accelerator"])
    def test_they_are_followed_where_nobody_wrote_an_architecture(self, machine, request):
        request.getfixturevalue(machine)
        assert compose("fine_tune_train_config", ["model.checkpoint=/m"]).sizes_from_checkpoint
        assert not compose(
            "fine_tune_train_config", ["model.checkpoint=/m", "model.hidden_size=96"]
        ).sizes_from_checkpoint

    def test_they_are_followed_without_a_preset_too(self):
        assert compose("fine_tune_train_config", ["model.checkpoint=/m", "preset=none"]).sizes_from_checkpoint


class TestSettlingExecution:
    def task(self, **keys) -> TrainingTaskConfig:
        return TrainingTaskConfig(**keys)

    @pytest.mark.parametrize("asked", ["gpu", "cuda"])
    def test_a_gpu_that_is_not_there_falls_back_with_a_note(self, asked):
        task, notes = settle_execution(self.task(accelerator=asked), None)
        assert task.accelerator == "cpu"
        assert len(notes) == 1 and asked in notes[0] and "NO GPU IS USABLE" in notes[0]

    @pytest.mark.parametrize("precision", ["16-mixed", "16-true", "16"])
    def test_half_precision_without_a_gpu_falls_back_with_a_note(self, precision):
        task, notes = settle_execution(self.task(precision=precision), None)
        assert task.precision == "32-true"
        assert len(notes) == 1 and "needs a GPU: using 32-true" in notes[0]

    def test_half_precision_on_a_cpu_that_was_chosen_beside_a_gpu_falls_back_too(self):
        task, notes = settle_execution(self.task(accelerator="cpu", precision="16-mixed"), "gpu")
        assert (task.accelerator, task.precision, len(notes)) == ("cpu", "32-true", 1)

    def test_both_are_noted(self):
        assert len(settle_execution(self.task(accelerator="gpu", precision="16-mixed"), None)[1]) == 2

    @pytest.mark.parametrize(
        ("machine", "accelerator", "precision"), [(None, "cpu", "32-true"), ("gpu", "gpu", "16-mixed")]
    )
    def test_auto_is_what_the_machine_has_and_needs_no_note(self, machine, accelerator, precision):
        task, notes = settle_execution(self.task(), machine)
        assert (task.accelerator, task.precision, notes) == (accelerator, precision, [])

    def test_auto_precision_on_a_cpu_that_was_chosen_is_full(self):
        assert settle_execution(self.task(accelerator="cpu"), "gpu")[0].precision == "32-true"

    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_what_the_machine_can_do_is_left_as_written(self, precision):
        task, notes = settle_execution(self.task(accelerator="cpu", precision=precision), None)
        assert (task.precision, notes) == (precision, [])

    def test_cuda_and_gpu_are_one(self):
        assert settle_execution(self.task(accelerator="cuda"), "gpu")[0].accelerator == "gpu"

    def test_precisions_that_a_device_does_not_have_are_changed_or_not_chosen(self):
        assert settle_execution(self.task(strategy="fsdp"), "gpu")[0].precision == "bf16-mixed"
        assert settle_execution(self.task(strategy="fsdp"), None)[0].precision == "32-true"
        task, notes = settle_execution(self.task(accelerator="mps", precision="64-true"), None)
        assert (task.precision, len(notes)) == ("32-true", 1)
        assert settle_execution(self.task(accelerator="cpu", precision="64-true"), None)[0].precision == "64-true"

    def test_an_accelerator_that_is_required_is_not_replaced(self):
        with pytest.raises(ConfigError, match=r"task\.require_accelerator is true, but no GPU is usable here"):
            settle_execution(self.task(require_accelerator=True), None)
        with pytest.raises(ConfigError, match=r"task\.require_accelerator is true, but task\.accelerator is cpu"):
            settle_execution(self.task(require_accelerator=True, accelerator="cpu"), "gpu")
        assert settle_execution(self.task(require_accelerator=True), "gpu")[0].accelerator == "gpu"

    def test_requiring_one_is_a_plain_override(self):
        assert compose("pre_train_config", ["task.require_accelerator=true"]).task.require_accelerator

    def test_settling_twice_changes_nothing_more(self):
        once, _ = settle_execution(self.task(accelerator="gpu", precision="16-mixed"), None)
        assert settle_execution(once, None) == (once, [])

    def test_the_machine_is_asked_without_importing_torch(self):
        code = (
            "import sys; from bmfm_pipeline.config import find_accelerator as find;"
            "print(find() in (None, 'gpu'), 'torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.split() == ["True", "False"]
