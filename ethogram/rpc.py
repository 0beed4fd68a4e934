"""gRPC on both sides: errors as google.rpc.Status with ErrorInfo and BadRequest, and the channel options."""

from __future__ import annotations

import grpc
from google.protobuf.any_pb2 import Any
from google.rpc import code_pb2, error_details_pb2
from google.rpc.status_pb2 import Status
from grpc_status import rpc_status

from ethogram.errors import (
    ERRORS,
    MAX_DESCRIPTION,
    EthogramError,
    Internal,
    TooLarge,
    Unavailable,
    Violation,
    printable,
)

DOMAIN = "ethogram"
MAX_MESSAGE_BYTES = 64 * 2**20

# Loopback and cluster traffic never goes through a proxy of the user's environment.
CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
]


def status_of(error: EthogramError) -> Status:
    """``error`` as the status message that travels."""
    details = []
    for detail in (
        error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN),
        error_details_pb2.BadRequest(
            field_violations=[
                error_details_pb2.BadRequest.FieldViolation(
                    field=printable(v.field)[:MAX_DESCRIPTION], description=printable(v.description)[:MAX_DESCRIPTION]
                )
                for v in error.violations
            ]
        ),
    ):
        packed = Any()
        packed.Pack(detail)
        details.append(packed)
    return Status(code=code_pb2.Code.Value(error.grpc_code), message=printable(error.message)[:1000], details=details)


def grpc_status_of(error: EthogramError) -> grpc.Status:
    """What a synchronous servicer hands to ``context.abort_with_status``."""
    return rpc_status.to_status(status_of(error))


def error_of(call: grpc.RpcError) -> EthogramError:
    """The error that a failed call carries, in the class it was raised as."""
    status = rpc_status.from_call(call)  # type: ignore[arg-type]
    if status is not None:
        reason, violations = "", []
        for packed in status.details:
            info, bad = error_details_pb2.ErrorInfo(), error_details_pb2.BadRequest()
            if packed.Unpack(info) and info.domain == DOMAIN:
                reason = info.reason
            elif packed.Unpack(bad):
                violations = [Violation(v.field, v.description) for v in bad.field_violations]
        if reason in ERRORS:
            return ERRORS[reason](status.message, violations)
    code, text = call.code(), call.details() or ""  # type: ignore[attr-defined]
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return TooLarge(f"{text}; send less in one message, or use the streaming call")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        return Unavailable(f"the service did not answer ({code.name}): {text}")
    return Internal(f"{code.name}: {text}")
