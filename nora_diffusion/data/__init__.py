"""Photos of a subject: found, checked before they are decoded, made upright and RGB, cropped and resized."""

from .photos import Photo, Reject, UnreadablePhotoError, find_photos, read_photo, read_photos, survey

__all__ = ["Photo", "Reject", "UnreadablePhotoError", "find_photos", "read_photo", "read_photos", "survey"]
