"""Photos of a subject: found, checked before they are decoded, made upright and RGB, cropped and resized."""

from .images import Reject, SourceImage, UnreadableImageError, find_images, read_images, read_source, survey

__all__ = ["Reject", "SourceImage", "UnreadableImageError", "find_images", "read_images", "read_source", "survey"]
