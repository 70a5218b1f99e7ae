"""The tabs of the app, one module each: ``TITLE`` and ``build(page)``; see ``ui/layout/page.py``."""
