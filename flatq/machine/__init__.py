"""This computer: processes, devices, memory, precision, progress."""
