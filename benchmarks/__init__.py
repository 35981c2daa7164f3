"""Measurements: machine code now, clocks and memory on the machine at hand."""
