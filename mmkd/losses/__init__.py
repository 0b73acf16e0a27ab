from mmkd.registry import discover

discover(__name__, __path__)
