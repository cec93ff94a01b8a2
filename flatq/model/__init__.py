"""What a decoder is: widths, modules, tensors, grids, families. Knows neither calibration nor recipe."""
