"""Judging a finished model from outside: tasks of lm-eval, and several models in one table."""
