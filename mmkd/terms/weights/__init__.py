"""Weights: how much each cell counts, where a term's loss leaves it open."""

from mmkd.registry import discover

discover(__name__, __path__)
