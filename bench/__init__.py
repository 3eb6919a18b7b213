"""Measurements against peers, as ratios in one run, medians of five. `python -m bench` runs them all."""
