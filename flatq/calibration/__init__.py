"""Text through the model, and what is measured on the way: Grams, sensitivity, importance, perplexity."""
