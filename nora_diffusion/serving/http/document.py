"""``/openapi.json``: what FastAPI derives from the routes, with the limits and the keys of this server."""

from __future__ import annotations

import re
from typing import Any

from fastapi import FastAPI

from ...generation.samplers import SAMPLERS
from ...generation.settings import MAX_GUIDANCE, MAX_PROMPT, MAX_SEED
from ..request import MAX_PRIORITY, MAX_SUBJECTS, MAX_TIMEOUT
from .config import ServeConfig

PARAMETER = re.compile(r"\{\w+\}")
OPEN = {"/health", "/ready"}
"""Routes without a key."""
INVALID = ("HTTPValidationError", "ValidationError")
"""Schemas of FastAPI's own answer to an invalid body, which is ours here."""


def describe(app: FastAPI, config: ServeConfig, keyed: bool) -> dict[str, Any]:
    """The document, which is the app's from now on. ``keyed``: whether requests need keys."""
    document = app.openapi()
    schemas = document["components"]["schemas"]
    for name in INVALID:
        schemas.pop(name, None)
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if path in OPEN or not keyed:
                operation["responses"].pop("401", None)
            else:
                operation["security"] = [{"bearer": []}, {"basic": []}]
    if keyed:
        kinds = {name: {"type": "http", "scheme": name} for name in ("bearer", "basic")}
        document["components"]["securitySchemes"] = kinds
    for name, schema in schemas.items():
        if name.endswith("Body"):
            _limit(schema["properties"], bounds(config))
    return document


def template(document: dict[str, Any], path: str) -> str:
    """The route that a path belongs to, such as ``/v1/subjects/{name}``; empty if there is none."""
    return next((own for own in document["paths"] if re.fullmatch(PARAMETER.sub("[^/]+", own), path)), "")


def methods(document: dict[str, Any], path: str) -> str:
    """The methods of a path, as the header ``Allow`` has them: of all its routes, not of the first one."""
    return ", ".join(sorted(name.upper() for name in document["paths"].get(template(document, path), ())))


def bounds(config: ServeConfig) -> dict[str, dict[str, Any]]:
    """The limits of each field. They are checked by the engine, whose sentences say more than those of a schema."""
    side = {"minimum": 8, "maximum": config.max_side, "multipleOf": 8}
    return {
        "prompt": {"minLength": 1, "maxLength": MAX_PROMPT},
        "negative_prompt": {"maxLength": MAX_PROMPT},
        "subjects": {"maxProperties": MAX_SUBJECTS},
        "adapters": {"maxProperties": MAX_SUBJECTS},
        "seed": {"minimum": -1, "maximum": MAX_SEED - 1},
        "steps": {"minimum": 1, "maximum": config.max_steps},
        "guidance": {"minimum": 0, "maximum": MAX_GUIDANCE},
        "cfg_scale": {"minimum": 0, "maximum": MAX_GUIDANCE},
        "width": side,
        "height": side,
        "size": {"pattern": "^(auto|[0-9]{1,5}x[0-9]{1,5})$"},
        "sampler": {"enum": list(SAMPLERS)},
        "priority": {"minimum": -MAX_PRIORITY, "maximum": MAX_PRIORITY},
        "timeout": {"minimum": 0.001, "maximum": MAX_TIMEOUT},
    }


def _limit(properties: dict[str, Any], limits: dict[str, dict[str, Any]]) -> None:
    for name in limits.keys() & properties:
        options = properties[name].get("anyOf", [properties[name]])
        for option in options:
            if option.get("type") != "null":
                option.update(limits[name])
