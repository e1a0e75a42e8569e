"""How the KV rows of a client lie in its pages; both sides compute every size from this alone."""

from __future__ import annotations

from typing import Annotated

import msgspec

__all__ = ["DTYPE_BYTES", "KVLayout"]

DTYPE_BYTES: dict[str, int] = {"bfloat16": 2, "float16": 2, "float32": 4}
"""Element sizes in bytes of the dtypes that a page can hold."""

# Generous bounds: they keep every product of sizes far from 2**63 and refuse nonsense early.
_MAX_HEADS = 1 << 20
_MAX_HEAD_DIM = 1 << 14
_MAX_PAGE_TOKENS = 1 << 16


class KVLayout(msgspec.Struct, frozen=True, kw_only=True):
    """Layout of one page: ``[num_heads, page_tokens, row_bytes]``, contiguous, in this order.

    A *row* is the K vector of one token and head, directly followed by its V vector.
    The *flat row index* of a row in a client's pages is
    ``(page_id * num_heads + head) * page_tokens + offset``.

    Attributes:
        num_heads: Heads a page holds rows of, >= 1; for a model, its compressed (layer, head)
            pairs.
        head_dim: Elements of one K (and one V) vector, >= 1.
        dtype: Element type, a key of ``DTYPE_BYTES``. memd only moves bytes and never computes.
        page_tokens: Token rows per head in a page, >= 1.
    """

    num_heads: Annotated[int, msgspec.Meta(ge=1, le=_MAX_HEADS)]
    head_dim: Annotated[int, msgspec.Meta(ge=1, le=_MAX_HEAD_DIM)]
    dtype: str
    page_tokens: Annotated[int, msgspec.Meta(ge=1, le=_MAX_PAGE_TOKENS)]

    def __post_init__(self) -> None:
        """Check what the types cannot say; a decoder turns the error into a refused frame."""
        for field, value, limit in (
            ("num_heads", self.num_heads, _MAX_HEADS),
            ("head_dim", self.head_dim, _MAX_HEAD_DIM),
            ("page_tokens", self.page_tokens, _MAX_PAGE_TOKENS),
        ):
            if not 1 <= value <= limit:
                raise ValueError(f"{field} must be in 1..{limit}, got {value}")
        if self.dtype not in DTYPE_BYTES:
            raise ValueError(f"dtype must be one of {sorted(DTYPE_BYTES)}, got {self.dtype!r}")

    @property
    def row_bytes(self) -> int:
        """Bytes of one row: K and V of one token and head."""
        return 2 * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def rows_per_page(self) -> int:
        """Rows of a page over all its heads."""
        return self.num_heads * self.page_tokens

    @property
    def page_bytes(self) -> int:
        """Bytes of one page."""
        return self.rows_per_page * self.row_bytes

    @property
    def bytes_per_token(self) -> int:
        """Bytes that one token takes over all heads."""
        return self.num_heads * self.row_bytes

    def row_index_bytes(self, num_pages: int) -> int:
        """Width in bytes (4 or 8) of a row index on the wire, for a client of ``num_pages``."""
        return 4 if num_pages * self.rows_per_page <= 1 << 32 else 8
