"""Envelopes: cuts the one large field out of a message's bytes as a view, or inserts it with a single join.

protobuf copies a tensor's data when it parses a message, again at each access of the field, and twice when it
serializes. This module therefore parses only the nested headers around the data, and leaves the rest to protobuf. For
anything unusual, such as repeated fields to be merged, it leaves the whole message to protobuf. Client and server both
use it.
"""

from collections.abc import Sequence
from typing import NamedTuple

LARGE_BYTES = 16 * 1024  # smaller fields are not cut out: a copy costs less than parsing here
MAX_FIELDS = 64  # limit of a message's fields; protobuf, in C, is faster for more
LENGTH_DELIMITED = 2
_ONE_BYTE = [bytes([value]) for value in range(0x80)]  # the varints of one byte
VARINT_BYTES = 5  # limit of a tag or a length, as in protobuf


class Cut(NamedTuple):
    rest: list[bytes | memoryview]  # the message without the field
    data: memoryview


class _Field(NamedTuple):
    tag: int
    at: int  # the start of its tag
    start: int  # the start of its content
    end: int


def cut(raw: memoryview, path: Sequence[int]) -> Cut | None:
    """Cut out the field at a path of field numbers. None unless it occurs exactly once, in the usual encoding."""
    found = _find(raw, path[0])
    if found is None:
        return None
    content = raw[found.start : found.end]
    if len(path) == 1:
        return Cut([raw[: found.at], raw[found.end :]], content)
    inner = cut(content, path[1:])
    if inner is None:
        return None
    return Cut([raw[: found.at], *field(path[0], inner.rest), raw[found.end :]], inner.data)


def _find(raw: memoryview, number: int) -> _Field | None:
    """Return the field with a number. None if it is missing, repeated or encoded unusually."""
    found, at = None, 0
    for _ in range(MAX_FIELDS):
        if at == len(raw):
            return found
        seen = _next(raw, at)
        if seen is None:
            return None
        if seen.tag >> 3 == number:
            if found or seen.tag & 7 != LENGTH_DELIMITED:
                return None
            found = seen
        at = seen.end
    return None


def _next(raw: memoryview, at: int) -> _Field | None:
    """Return the field at an offset. None for groups, unknown wire types and truncated fields."""
    begun = _varint(raw, at)
    if begun is None:
        return None
    tag, start = begun
    end = start
    match tag & 7:
        case 0:
            while end < len(raw) and raw[end] & 0x80:
                end += 1
            end += 1
        case 1:
            end += 8
        case 2:
            prefix = _varint(raw, start)
            if prefix is None:
                return None
            length, start = prefix
            end = start + length
        case 5:
            end += 4
        case _:
            return None
    return _Field(tag, at, start, end) if end <= len(raw) else None


def _varint(raw: memoryview, at: int) -> tuple[int, int] | None:
    """Return a tag or a length, and the offset of its end. None if it is too long or truncated."""
    value = 0
    for index, byte in enumerate(raw[at : at + VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * index)
        if byte < 0x80:
            return value, at + index + 1
    return None


def field(number: int, content: Sequence[bytes | memoryview]) -> list[bytes | memoryview]:
    """Return the pieces of a length-delimited field."""
    return [_encode_varint(number << 3 | LENGTH_DELIMITED), _encode_varint(sum(map(len, content))), *content]


def _encode_varint(value: int) -> bytes:
    if value < 0x80:
        return _ONE_BYTE[value]
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
