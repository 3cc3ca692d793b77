"""How good: the same questions to every arm, with intervals over documents. Refuses to load or train anything."""

from potstill.evaluation.bootstrap import Resampling
from potstill.evaluation.calibration import BINS, ReliabilityBin, bin_sums, calibration_error, reliability
from potstill.evaluation.classes import (
    TOLD_SLICES,
    ClassRow,
    Confusion,
    Marks,
    Truth,
    added_confusions,
    compare_classes,
    mark,
    tabulate_classes,
)
from potstill.evaluation.embeddings import compare_embeddings, compare_likeness, likeness
from potstill.evaluation.intervals import Quantity, exact_interval
from potstill.evaluation.latency import AT_ONCE, Latency, Round, cost_usd_per_1000, measure_latency
from potstill.evaluation.quality import DocumentScores, compare_arms, score_arm
from potstill.evaluation.scope import Confidences, Threshold, choose_threshold, measure_scope, score_confidence
from potstill.evaluation.solving import PASS, compare_likelihoods, compare_solvers
from potstill.evaluation.speed import Speed, folder_bytes, measure_speed
from potstill.evaluation.temperature import HIGHEST, LOWEST, fit_temperature
from potstill.evaluation.words import marks_entities, measure_entities

__all__ = [
    "AT_ONCE",
    "BINS",
    "HIGHEST",
    "LOWEST",
    "PASS",
    "TOLD_SLICES",
    "ClassRow",
    "Confidences",
    "Confusion",
    "DocumentScores",
    "Latency",
    "Marks",
    "Quantity",
    "ReliabilityBin",
    "Resampling",
    "Round",
    "Speed",
    "Threshold",
    "Truth",
    "added_confusions",
    "bin_sums",
    "calibration_error",
    "choose_threshold",
    "compare_arms",
    "compare_classes",
    "compare_embeddings",
    "compare_likelihoods",
    "compare_likeness",
    "compare_solvers",
    "cost_usd_per_1000",
    "exact_interval",
    "fit_temperature",
    "folder_bytes",
    "likeness",
    "mark",
    "marks_entities",
    "measure_entities",
    "measure_latency",
    "measure_scope",
    "measure_speed",
    "reliability",
    "score_arm",
    "score_confidence",
    "tabulate_classes",
]
