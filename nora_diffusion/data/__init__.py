"""The images of a subject and their captions: reading, checking, cropping, masks, duplicates, reports."""

from .folder import Reject, find_images
from .images import Pixels, SourceImage, UnreadableImageError, read_images, read_source, survey, survey_files

__all__ = [
    "Pixels", "Reject", "SourceImage", "UnreadableImageError", "find_images", "read_images", "read_source", "survey",
    "survey_files",
]  # fmt: skip
