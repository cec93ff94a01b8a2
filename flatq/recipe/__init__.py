"""The recipe: the YAML file that holds everything that changes a number. Imports no torch."""
