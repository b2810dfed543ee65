"""A file that a transform names enters the key by its content: another list of genes makes another artefact."""

from bmfm_pipeline.stages.planning import compose_stage, plan_preprocess
from bmfm_pipeline.storage import Workspace


def test_a_changed_list_of_genes_makes_another_artefact(tmp_path):
    genes = tmp_path / "genes.txt"
    step = f"{{transform_name: KeepGenesTransform, transform_args: {{genes_to_keep: {genes}}}}}"
    run = compose_stage("preprocess", "zheng68k-mini", overrides=[f"data_module.transform_kwargs.transforms=[{step}]"])
    keys = []
    for listed in ("CD3D\nLYZ\n", "CD3D\nLYZ\n", "CD3D\nMS4A1\n"):
        genes.write_text(listed)
        keys.append(plan_preprocess(run, Workspace(str(tmp_path / "workspace"))).key)
    assert keys[0] == keys[1] != keys[2]
