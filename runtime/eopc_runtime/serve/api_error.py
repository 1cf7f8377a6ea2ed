"""Every error in the shape of OpenAI's API: {"error": {"message", "type", "param", "code"}}."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from starlette.responses import JSONResponse

from eopc_runtime.errors import (
    AllowanceError,
    BudgetError,
    DrainingError,
    EopcError,
    PromptError,
    QueueFullError,
    SequenceCancelledError,
    UsageError,
)

DRAIN_RETRY_S = 30  # when to ask again while this process ends, and another may take its place


class ApiError(EopcError):
    """An answer other than 200: its status, and what the error object says."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.code, self.param = status, kind, code, param
        self.retry_after_s = retry_after_s

    def to_json(self) -> dict[str, Any]:
        """Return the error object."""
        error = {"message": str(self), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self, headers: Mapping[str, str] | None = None) -> JSONResponse:
        """Return the answer, with Retry-After where asking again may help."""
        own = dict(headers or {})
        if self.retry_after_s is not None:
            own["Retry-After"] = str(max(math.ceil(self.retry_after_s), 1))
        if self.status == 401:
            own["WWW-Authenticate"] = "Bearer"
        return JSONResponse(self.to_json(), self.status, own)


def as_api_error(error: Exception) -> ApiError:
    """Return any error as an answer; one that is nobody's mistake but ours tells nothing of its inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, AllowanceError):
        return ApiError(
            429, str(error), kind="insufficient_quota", code="allowance_spent", retry_after_s=error.retry_after_s
        )
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error), kind="rate_limit_error", code="queue_full", retry_after_s=error.retry_after_s)
    if isinstance(error, (DrainingError, SequenceCancelledError)):
        return ApiError(503, str(error), kind="server_error", code="draining", retry_after_s=DRAIN_RETRY_S)
    if isinstance(error, BudgetError):
        return ApiError(400, str(error), code="budget_too_small", param="energy_budget_j")
    if isinstance(error, PromptError):
        return ApiError(400, str(error), code="invalid_prompt")
    if isinstance(error, UsageError):
        return ApiError(400, str(error))
    if isinstance(error, EopcError):
        return ApiError(500, str(error), kind="server_error")
    return ApiError(500, "The server failed in a way it does not know; its log says how.", kind="server_error")
