"""Response headers that restrict what a browser does with the page."""

from __future__ import annotations

POLICY = {
    "default-src": "'none'",
    # Gradio's page has inline scripts and styles, and compiles the scripts of event handlers.
    "script-src": "'self' 'unsafe-inline' 'unsafe-eval'",
    "style-src": "'self' 'unsafe-inline'",
    "img-src": "'self' data: blob:",
    "font-src": "'self' data:",
    "media-src": "'self' data: blob:",
    "connect-src": "'self' data: blob:",
    "worker-src": "'self' blob:",
    "manifest-src": "'self'",
    "form-action": "'self'",
    "base-uri": "'self'",
    "frame-ancestors": "'none'",
}
"""Content security policy of the page: it loads nothing from, and sends nothing to, another server."""
FILE_POLICY = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'; sandbox"
"""Content security policy of files that clients uploaded or the app made: nothing in them may run."""
UNUSED_FEATURES = (
    "accelerometer", "camera", "display-capture", "geolocation", "gyroscope", "magnetometer", "microphone", "midi",
    "payment", "usb",
)  # fmt: skip
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "X-Frame-Options": "DENY",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Permissions-Policy": ", ".join(f"{name}=()" for name in UNUSED_FEATURES),
    "Cross-Origin-Resource-Policy": "same-origin",
}
"""Headers of every response."""


def headers_for(path: str) -> list[tuple[bytes, bytes]]:
    """The headers of a response to a request for ``path``, as ASGI wants them."""
    headers = HEADERS | ({"Content-Security-Policy": FILE_POLICY} if path.startswith("/gradio_api/file=") else {})
    return [(name.lower().encode(), value.encode()) for name, value in headers.items()]
