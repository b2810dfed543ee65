"""Prefect flows over the stages of bmfm_pipeline: one file a flow, and the only package that imports Prefect."""
