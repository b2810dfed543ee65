"""Cells of other data prepared for a model that is trained already: its gene mapping, its fitted transforms, its vocabularies, no row filter."""

from typing import TYPE_CHECKING, Any

from bmfm_pipeline.config import RunConfig
from bmfm_pipeline.stages.jobs import Job
from bmfm_pipeline.storage import content_hash, join_uri, localise, read_json, strip_userinfo

if TYPE_CHECKING:  # planning asks for an input alone
    from bmfm_pipeline.data.transforms import Chain

# The role of the fitted transforms among the inputs of preprocessing: where it is there, nothing is fitted anew.
ROLE = "fitted_transforms"
OTHER_NAMES = (
    "Rename the genes of the file to the names that the model was trained with; a model whose data were preprocessed with "
    "data_module.transform_kwargs.gene_names.table=hgnc (after `bmfm genes download`) takes symbols, aliases and Ensembl ids alike"
)


def transforms_input(model: str, memo) -> dict[str, dict[str, Any]]:
    """The fitted transforms that the model at address `model` carries, as an input of preprocessing."""
    uri = join_uri(model, "transforms.json")
    return {ROLE: {"id": content_hash(uri, memo), "uri": strip_userinfo(uri)}}


def is_for_model(job: Job) -> bool:
    """Whether the cells are prepared for a model, and not to fit one."""
    return ROLE in job.inputs


def chain_of_model(job: Job) -> "Chain":
    from bmfm_pipeline.data.transforms import Chain

    return Chain.from_json(read_json(localise(job.inputs[ROLE]["uri"])))


def check_for_model(job: Job, run: RunConfig, chain: "Chain", cells) -> None:
    """Raise DataError where the model knows hardly any gene of the cells."""
    from bmfm_pipeline.data.sources import check_genes
    from bmfm_pipeline.stages.vocabularies import fixed_vocabularies

    if not is_for_model(job):
        return
    names, genes = chain.gene_names(list(cells.var_names)), fixed_vocabularies(run)["genes"]
    own = genes.tokens[genes.n_special :]
    # A model of few genes finds them all in a file of many.
    floor = {"min_share": 0.0} if 2 * len(set(own) & set(names)) >= len(own) else {}
    check_genes(names, genes.tokens, "the model", cure=OTHER_NAMES, **floor)
