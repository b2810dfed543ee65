"""The form of the predict flow: a model, a file, and what is written of its cells."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, WithJsonSchema, field_validator, model_validator

from flows.parameters import Form, Positive, Text

TableFormat = Annotated[Literal["csv", "parquet"], WithJsonSchema({"type": "string", "enum": ["csv", "parquet"]})]


class PredictParameters(Form):
    """Labels, probabilities and embeddings for the cells of an h5ad file; labels are not needed."""

    model: str = Field(
        title="Model",
        description="A model artefact or folder, a .ckpt file, org/name of the hub, or 'latest' for the newest fine-tuned model.",
    )
    input: str = Field(
        title="Cells or sequences",
        description="An h5ad file, or a table or FASTA file of sequences, local or on s3, that the worker can read.",
    )
    output: str = Field(
        title="Output folder", description="A folder on the worker, made when it is not there, or s3://bucket/prefix."
    )
    layer: Text = Field(None, title="Layer", description="Where the file holds counts, or 'raw'. Empty: X.")
    pooling: list[str] = Field(
        default_factory=list,
        title="Pooling",
        description="How embeddings are taken, one each: first_token, pooling_layer, mean_pooling, a position, or several joined with +. "
        "Empty: as in training.",
    )
    format: TableFormat = Field("csv", title="Table format", description="Of the tables: csv or parquet.")
    h5ad: bool = Field(
        True,
        title="Copy of the file",
        description="Also write predicted.h5ad, the input with labels and embeddings in it. Of sequences there is none.",
    )
    umap: bool = Field(False, title="Map", description="Also two coordinates per cell.")
    batch_column: Text = Field(
        None, title="Batch column", description="An obs column of the input: score how well embeddings mix its values."
    )
    unknown_below: Text = Field(
        None,
        title="Unknown below",
        description="Cells less sure than this are called unknown: a number, or 'auto' for the model's own threshold. Empty: none.",
    )
    windows: bool = Field(
        False,
        title="Windows",
        description="Of sequences: those longer than the model reads are read in overlapping windows and the answers averaged, not cut.",
    )
    batch_size: Positive = Field(None, title="Batch size", description="Cells in a batch. Empty: as in training.")

    @field_validator("format", mode="before")
    @classmethod
    def _csv_unless_said(cls, value: Any) -> Any:
        return "csv" if value is None or not str(value).strip() else value

    @field_validator("pooling", mode="before")
    @classmethod
    def _no_list_is_empty(cls, value: Any) -> Any:
        return [] if value is None else value

    @model_validator(mode="after")
    def _can_be_read(self):
        from bmfm_pipeline.errors import ConfigError

        try:
            self.asked()
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self

    def asked(self) -> Any:
        """The same as predict_file takes it."""
        from bmfm_pipeline.config.sequences import ENDINGS, FASTA
        from bmfm_pipeline.stages.predicting.asked import ANNOTATED, Asked

        cells = not (self.input.lower().endswith((*ENDINGS, *FASTA)) or Path(self.input).is_dir())
        return Asked(
            poolings=self.pooling,
            format=self.format,
            annotated=ANNOTATED if self.h5ad and cells else None,
            unknown_below=self.unknown_below,
            umap=self.umap,
            batch_column=self.batch_column,
        )
