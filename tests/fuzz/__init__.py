"""Fuzzing of every reader: ``python -m tests.fuzz --inputs 100000`` (``make fuzz``)."""
