"""gRPC for clients and servers: errors as google.rpc.Status with ErrorInfo and BadRequest, and channel options."""

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
# gRPC drops metadata at random above 8 KiB and always above 16 KiB, and answers RESOURCE_EXHAUSTED instead. The message
# travels twice (once percent-encoded) beside the details, which grow by a third in base64.
MAX_DETAIL_BYTES = 3 * 2**10
MAX_MESSAGE_TEXT = 600

# Loopback and cluster traffic must not go through a proxy from the user's environment.
CHANNEL_OPTIONS: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
    ("grpc.enable_http_proxy", 0),
]


def grpc_status_of(error: EthogramError) -> grpc.Status:
    """``error`` for ``abort_with_status`` of a context, without the violations that exceed the size of details."""
    info = error_details_pb2.ErrorInfo(reason=error.reason, domain=DOMAIN)
    bad = error_details_pb2.BadRequest()
    for violation in error.violations:
        field, description = (printable(text)[:MAX_DESCRIPTION] for text in violation)
        if bad.ByteSize() + len(field.encode()) + len(description.encode()) > MAX_DETAIL_BYTES:
            break
        bad.field_violations.add(field=field, description=description)
    details = []
    for detail in (info, bad):
        packed = Any()
        packed.Pack(detail)
        details.append(packed)
    message = printable(error.message).encode()[:MAX_MESSAGE_TEXT].decode(errors="ignore")
    return rpc_status.to_status(Status(code=code_pb2.Code.Value(error.grpc_code), message=message, details=details))


def error_of(call: grpc.RpcError) -> EthogramError:
    """The error of a failed call, in the class in which it was raised."""
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
    code, text = call.code(), call.details() or ""
    if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
        return TooLarge(f"{text}; send less in one message, or use the streaming call")
    if code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED):
        return Unavailable(f"the service did not answer ({code.name}): {text}")
    return Internal(f"{code.name}: {text}")
