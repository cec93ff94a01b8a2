"""Evaluation of finished models: tasks of lm-eval, and comparison of several models in one table."""
