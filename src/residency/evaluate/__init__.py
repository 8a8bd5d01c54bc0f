"""Scores with intervals, per-item flips and measured cost."""
