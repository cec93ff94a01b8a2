"""Several runs of one recipe: grids, the trade-off between quality, bytes and speed, and what to choose."""
