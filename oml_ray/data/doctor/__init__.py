"""The data set doctor: what the images of a table tell beyond what the table itself can.

Everything is decoded once (`examine`), and judged by a few numbers of each image: copies over the splits and over
labels (`repeats`), odd sizes and boxes (`measures`).
"""

from oml_ray.data.doctor.diagnosis import Diagnosis, decoding_notes, diagnose, told
from oml_ray.data.doctor.examined import Examined, examine
from oml_ray.data.doctor.measures import label_overlap

__all__ = ["Diagnosis", "Examined", "decoding_notes", "diagnose", "examine", "label_overlap", "told"]
