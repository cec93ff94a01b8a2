"""The pipeline: all steps of a run, in ``run.py``."""
