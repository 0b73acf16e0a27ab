from mmkd.structures.ground_truth import GroundTruth
from mmkd.structures.step import Outputs, Step

__all__ = ['GroundTruth', 'Outputs', 'Step']
