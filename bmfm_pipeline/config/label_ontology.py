"""The section of a label column that says which ontology its classes belong to."""

from typing import Any, Literal

from pydantic import Field, field_validator

from bmfm_pipeline.config.strict import Section


class LabelOntology(Section):
    """An ontology of classes, such as the Cell Ontology, so that a cell labelled by a broad class may be any of those below it.

    `file`: an OBO or OWL (RDF/XML) file, plain or gzip, local or s3://. `relations`: the links that lead from a term to those above
    it. `terms`: {class: id or name of its term} for classes that the ontology calls otherwise. `unmapped`: a class without a term
    is an `error`, or `flat`: it stands beside all others.
    """

    file: str
    relations: list[Literal["is_a", "part_of"]] = Field(default_factory=lambda: ["is_a"], min_length=1)
    terms: dict[str, str] = Field(default_factory=dict)
    unmapped: Literal["error", "flat"] = "error"

    @field_validator("file")
    @classmethod
    def _is_a_file(cls, value: str) -> str:
        if "/" not in value and "." not in value:
            raise ValueError(
                f"'{value}' is no path of a file, and no ontology ships with this package; name an OBO or OWL file, such as cl.owl of "
                "https://obofoundry.org/ontology/cl.html"
            )
        return value


def read_ontology(value: Any) -> Any:
    """A path alone is the `file`."""
    return {"file": value} if isinstance(value, str) else value
