"""Errors in the format of OpenAI's API: ``{"error": {"message", "type", "param", "code"}}`` and a status."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

TYPES = {
    **dict.fromkeys((400, 405, 413), "invalid_request_error"),
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
}
"""Type of an error by status; any other status is a ``server_error``."""


class ApiError(Exception):
    """The error of a request that cannot be answered.

    Args:
        param: key of the request that is wrong.
        code: word for programs, such as ``model_not_found``.
        retry_after: seconds until another attempt makes sense.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, _unicode(message), None if param is None else _unicode(param)
        self.code, self.retry_after = code, retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The body of the response."""
        kind = TYPES.get(self.status, "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def _unicode(text: str) -> str:
    """The text with halves of surrogate pairs written as escapes: a response could not be encoded otherwise."""
    return text.encode("utf-8", "backslashreplace").decode()


def validation_error(problems: Sequence[Any]) -> ApiError:
    """Turns pydantic's problems with a body into one error about the first of them."""
    first = problems[0]
    place = [str(step) for step in first["loc"] if step != "body"]
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', first['msg'])}")
    if not place and first["type"] in ("missing", "model_attributes_type"):
        return ApiError(400, "the body should be a JSON object, sent with Content-Type: application/json")
    message = first["msg"].removeprefix("Value error, ")
    named = message.partition(": ")[0]  # checks of several arguments begin with the name of the one to change
    param = place[0] if place else named if named.isidentifier() else None
    if first["type"] == "extra_forbidden":
        message = "unknown argument; leave it out"
    if first["type"] == "missing":
        message = "is missing"
    where = ".".join(step for step in place if not step.startswith(("list[", "function-", "model-", "constrained-")))
    return ApiError(400, f"{where}: {message}" if where else message, param=param, code="invalid_value")


def server_error(error: Exception) -> ApiError:
    """Makes the error for a fault of the server."""
    return ApiError(500, f"the server failed: {type(error).__name__}: {error}", code="internal_error")
