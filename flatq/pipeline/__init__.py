"""The story of a run. Read ``run.py`` first."""
