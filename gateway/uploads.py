"""Uploads of artifacts as ``multipart/form-data``, written to disk while they arrive."""

from __future__ import annotations

import errno
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote_to_bytes

from pydantic import BaseModel, ConfigDict, ValidationError
from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header

from ethogram.errors import InvalidInput, TooLarge, Unavailable, printable
from gateway.inputs import Name
from services.artifacts.backends import disk_is_full
from services.artifacts.manifest import check_path
from services.artifacts.store import MAX_FILES

MAX_FIELD_BYTES = 1024
MAX_HEADER_BYTES = 16_384
_PARAMETER = re.compile(rb";\s*([^\s=;]+)\s*=\s*(\"(?:\\.|[^\"\\])*\"|[^;]*)")
_EXTENDED = re.compile(rb"(UTF-8|ISO-8859-1)'[^']*'(.*)", re.IGNORECASE)


class UploadFields(BaseModel):
    """The fields of an upload besides its files."""

    model_config = ConfigDict(extra="forbid")

    name: Name
    type: Name


class Upload:
    """Feed it the body, then ``finish``; ``discard`` in any case. It blocks: call it in a thread.

    The parts are fields ``name`` and ``type`` and one or more ``files``, whose file names are paths in the artifact.
    """

    def __init__(self, work: Path, content_type: str) -> None:
        """Make a new folder in ``work``. Raises :class:`InvalidInput`."""
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or not options.get(b"boundary"):
            raise InvalidInput.field("(root)", "send multipart/form-data with the fields name, type and files")
        self._fields: dict[str, bytearray] = {}
        self._files = 0
        self._header_name, self._header_value = bytearray(), bytearray()
        self._headers: dict[bytes, bytes] = {}
        self._field: bytearray | None = None
        self._file: BinaryIO | None = None
        self._ended = False
        with _clear_errors():
            self._parser = MultipartParser(
                options[b"boundary"],
                {
                    "on_part_begin": self._headers.clear,
                    "on_header_field": partial(_grow, self._header_name, MAX_HEADER_BYTES),
                    "on_header_value": partial(_grow, self._header_value, MAX_HEADER_BYTES),
                    "on_header_end": self._on_header_end,
                    "on_headers_finished": self._on_headers,
                    "on_part_data": self._on_data,
                    "on_part_end": self._end,
                    "on_end": partial(setattr, self, "_ended", True),
                },
            )
            self.folder = Path(tempfile.mkdtemp(prefix="upload-", dir=work))

    def feed(self, chunk: bytes) -> None:
        """Take the next bytes of the body. Raises :class:`InvalidInput`, :class:`TooLarge` or :class:`Unavailable`."""
        with _clear_errors():
            self._parser.write(chunk)

    def finish(self) -> UploadFields:
        """The fields of the complete upload; ``folder`` then holds the files and nothing else.

        Raises :class:`InvalidInput` when something is missing.
        """
        if not self._ended:
            raise InvalidInput.field("(root)", "the body ends before the multipart data does")
        try:
            fields = UploadFields.model_validate({name: bytes(value) for name, value in self._fields.items()})
        except ValidationError as error:
            raise InvalidInput.from_pydantic(error, model=UploadFields) from None
        if not self._files:
            raise InvalidInput.field("files", "send one part `files`, with a file name, for each file")
        return fields

    def discard(self) -> None:
        """Remove the files from disk."""
        self._end()
        shutil.rmtree(self.folder, ignore_errors=True)

    # Callbacks of the parser, in the order of a part: headers, data, end.

    def _on_header_end(self) -> None:
        self._headers[bytes(self._header_name).lower()] = bytes(self._header_value)
        self._header_name.clear()
        self._header_value.clear()

    def _on_headers(self) -> None:
        options = _parameters(self._headers.get(b"content-disposition", b""))
        name = _text(options.get(b"name", b""), "(root)")
        if b"filename" not in options:
            if name in self._fields:
                raise InvalidInput.field(name, "is there twice")
            if name not in UploadFields.model_fields:
                raise InvalidInput.field(name or "(root)", "is no field of an upload; there are: name, type, files")
            self._field = self._fields[name] = bytearray()
            return
        if name != "files":
            raise InvalidInput.field(name or "(root)", "a part with a file name must be called `files`")
        field = f"files.{self._files}"
        path = check_path(_text(options[b"filename"], field), field)
        if self._files >= MAX_FILES:
            raise TooLarge(f"an artifact holds at most {MAX_FILES} files; put them into fewer, larger ones")
        target = self.folder / path
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            self._file = target.open("xb")
            self._files += 1
        except (FileExistsError, NotADirectoryError):
            # Another file has this path, or is a folder of it.
            raise InvalidInput.field(field, f"the path {path!r} is there twice") from None
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            raise InvalidInput.field(field, "a part of the path is too long for a file name") from None

    def _on_data(self, data: bytes, start: int, end: int) -> None:
        if self._file is None:
            assert self._field is not None
            _grow(self._field, MAX_FIELD_BYTES, data, start, end)
            return
        self._file.write(memoryview(data)[start:end])

    def _end(self) -> None:
        if self._file is not None:
            self._file.close()
        self._file = self._field = None


def _parameters(header: bytes) -> dict[bytes, bytes]:
    """The parameters of a Content-Disposition, with those in the extended form (``filename*=UTF-8''%C3%B6``; RFC 8187),
    which take precedence: RFC 7578 forbids it in forms, and clients send it nevertheless."""
    _, options = parse_options_header(header)
    for key, value in _PARAMETER.findall(header):
        if key.endswith(b"*"):
            match = _EXTENDED.fullmatch(value.strip(b' \t"'))
            if match is None:
                raise InvalidInput.field(
                    "(root)", f"{printable(key.decode('latin-1'))} must be UTF-8''NAME, percent-encoded"
                )
            text = unquote_to_bytes(match[2])
            latin = match[1].upper() != b"UTF-8"
            options[key[:-1].lower()] = text.decode("latin-1").encode() if latin else text
    return options


def _grow(target: bytearray, limit: int, data: bytes, start: int, end: int) -> None:
    if len(target) + end - start > limit:
        raise InvalidInput.field("(root)", f"a field or header is longer than {limit} bytes")
    target += data[start:end]


def _text(value: bytes, field: str) -> str:
    try:
        return value.decode()
    except UnicodeDecodeError:
        raise InvalidInput.field(field, "is not UTF-8") from None


@contextmanager
def _clear_errors() -> Iterator[None]:
    try:
        yield
    except FormParserError as error:
        raise InvalidInput.field("(root)", f"is not multipart/form-data: {error}") from None
    except OSError as error:
        if not disk_is_full(error):
            raise
        raise Unavailable("the gateway's disk has no space left for the upload; free some and send it again") from None
