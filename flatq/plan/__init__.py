"""Everything that is decided before the walk: widths, bits, sizes, objections, forecasts."""
