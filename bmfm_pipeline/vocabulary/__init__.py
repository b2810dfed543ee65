"""Token ids of genes, binned expressions and flags: built from data or read from tokenizer folders."""

from bmfm_pipeline.vocabulary.building import build_vocabularies
from bmfm_pipeline.vocabulary.vocabulary import SPECIAL_TOKENS, MultiFieldVocabulary, Vocabulary

__all__ = ["SPECIAL_TOKENS", "MultiFieldVocabulary", "Vocabulary", "build_vocabularies"]
