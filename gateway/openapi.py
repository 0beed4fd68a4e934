"""The OpenAPI document, in a form that code generators take whole."""

from __future__ import annotations

import json
from typing import Any

from fastapi import FastAPI

from gateway.problems import MEDIA_TYPE


def install(app: FastAPI) -> None:
    """Give ``app`` a document whose schemas generators can name, and whose defaults they can write."""
    make = app.openapi

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            description = make()
            for name, schema in description["components"]["schemas"].items():
                # Generators name a class by its title, and drop the second of a name with all that uses it.
                schema["title"] = name
                for field in schema.get("properties", {}).values():
                    _describe_default(field)
            operations = [operation for path in description["paths"].values() for operation in path.values()]
            for operation in operations:
                for response in operation["responses"].values():
                    content = response.get("content", {})
                    # The framework files a model under its own media type, beside the one that is sent.
                    if MEDIA_TYPE in content:
                        response["content"] = {MEDIA_TYPE: content["application/json"]}
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = document  # type: ignore[method-assign]


def _describe_default(field: dict[str, Any]) -> None:
    """Say in words a default that is an object: generators have no expression for it. A left-out field is the same."""
    if isinstance(field.get("default"), dict):
        default = json.dumps(field.pop("default"))
        field["description"] = f"{field.get('description', '')} Default: `{default}`.".strip()
