"""From a prompt with tags to images that carry their settings."""
