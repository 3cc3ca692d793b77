"""How good: the same questions to every arm, with intervals over documents. Refuses to load or train anything."""

from potstill.evaluation.bootstrap import Resampling
from potstill.evaluation.calibration import BINS, ReliabilityBin, bin_sums, calibration_error, reliability
from potstill.evaluation.quality import DocumentScores, compare_arms, score_arm
from potstill.evaluation.speed import Speed, folder_bytes, measure_speed

__all__ = [
    "BINS",
    "DocumentScores",
    "ReliabilityBin",
    "Resampling",
    "Speed",
    "bin_sums",
    "calibration_error",
    "compare_arms",
    "folder_bytes",
    "measure_speed",
    "reliability",
    "score_arm",
]
