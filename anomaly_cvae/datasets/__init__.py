"""Data sets for the pipelines; none is downloaded."""

from anomaly_cvae.datasets.digits import DIGIT_MAX, DIGIT_SIDE, ClaimedDigits, claimed_digits, damage
from anomaly_cvae.datasets.faces import ATTRIBUTES, faces
from anomaly_cvae.datasets.labelled_images import LabelledImages, binarise, labelled_images

__all__ = [
    "ATTRIBUTES",
    "DIGIT_MAX",
    "DIGIT_SIDE",
    "ClaimedDigits",
    "LabelledImages",
    "binarise",
    "claimed_digits",
    "damage",
    "faces",
    "labelled_images",
]
