"""flatq makes a large language model small and fast without training it."""

__version__ = "0.1.0"
