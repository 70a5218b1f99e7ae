"""Photos of a subject: found, checked before they are decoded, made upright and RGB, cropped and resized."""

from .photos import Photo, UnreadablePhotoError, crop_boxes, find_photos, read_photo, read_photos, square, to_rgb

__all__ = [
    "Photo", "UnreadablePhotoError", "crop_boxes", "find_photos", "read_photo", "read_photos", "square", "to_rgb",
]  # fmt: skip
