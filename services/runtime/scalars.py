"""TensorBoard event files, written without ``tensorboardX``: that imports torch, which takes seconds."""

from __future__ import annotations

import errno
import os
import re
import socket
import struct
import time
from array import array
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO


class ScalarsFile:
    """An event file of scalars in ``folder``, readable while it grows.

    A file is a sequence of TFRecords (a length, its checksum, the data, their checksum), each a protobuf message
    ``tensorflow.Event``; see tensorflow/core/util/event.proto and tensorflow/core/framework/summary.proto.
    """

    def __init__(self, folder: Path) -> None:
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}"
        self._file = (folder / name).open("wb", buffering=0)
        self._write(_field(3, b"brain.Event:2"))

    def add(self, stage: str, step: int, metrics: Mapping[str, float | None]) -> None:
        """Add a scalar ``stage/name`` for each number."""
        for name, value in metrics.items():
            if value is not None:
                tag = re.sub(r"[^-/\w.]", "_", f"{stage}/{name}" if stage else name)
                # An array, because struct refuses numbers that exceed a float32.
                scalar = _field(1, tag.encode()) + b"\x15" + array("f", [value]).tobytes()
                self._write(b"\x10" + _varint(step) + _field(5, _field(1, scalar)))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _write(self, fields: bytes) -> None:
        event = b"\x09" + struct.pack("<d", time.time()) + fields
        length = struct.pack("<Q", len(event))
        append(self._file, length + _checksum(length) + event + _checksum(event))


def append(file: BinaryIO, data: bytes) -> None:
    """Write ``data`` at the end of an unbuffered file, or raise :class:`OSError` and leave it as it was."""
    end = os.fstat(file.fileno()).st_size
    try:
        if file.write(data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError:
        with suppress(OSError):
            file.truncate(end)
        raise


def _field(number: int, data: bytes) -> bytes:
    """A protobuf field of bytes, a string or a message."""
    return bytes([number << 3 | 2]) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])


def _remainder(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
    return byte


_REMAINDERS = [_remainder(byte) for byte in range(256)]


def _checksum(data: bytes) -> bytes:
    """CRC-32C, masked as TFRecords have it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _REMAINDERS[(crc ^ byte) & 0xFF] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return struct.pack("<I", (crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF)
