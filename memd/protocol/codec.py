"""Frames to messages and back: one encoder, and one typed decoder for each direction."""

from __future__ import annotations

import msgspec

from memd.errors import ProtocolError
from memd.protocol.messages import ErrorReply, Reply, Request, Welcome

__all__ = ["decode_reply", "decode_request", "decode_welcome", "encode"]

_ENCODER = msgspec.msgpack.Encoder()
_REQUESTS: msgspec.msgpack.Decoder[Request] = msgspec.msgpack.Decoder(Request)
_REPLIES: msgspec.msgpack.Decoder[Reply] = msgspec.msgpack.Decoder(Reply)
_WELCOMES: msgspec.msgpack.Decoder[Welcome | ErrorReply] = msgspec.msgpack.Decoder(
    Welcome | ErrorReply
)


def encode(message: Request | Reply | Welcome) -> bytes:
    """The frame of a message."""
    return _ENCODER.encode(message)


def decode_request(frame: bytes) -> Request:
    """The request in a frame.

    Raises:
        ProtocolError: The frame is not MessagePack, or not a request of this version.
    """
    try:
        return _REQUESTS.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a request: {error}") from error


def decode_reply(frame: bytes) -> Reply:
    """The reply in a frame.

    Raises:
        ProtocolError: The frame is not MessagePack, or not a reply of this version.
    """
    try:
        return _REPLIES.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a reply: {error}") from error


def decode_welcome(frame: bytes) -> Welcome | ErrorReply:
    """What memd says first on the attach socket: a welcome, or why it refuses.

    Raises:
        ProtocolError: The bytes are neither.
    """
    try:
        return _WELCOMES.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError(f"not a welcome: {error}") from error
