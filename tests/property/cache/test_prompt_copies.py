"""A prompt put together on a device lands in memd's pages like one that is copied by rows."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from hetero_sglang.cache.prompt_copies import DirectWriter, PackedWriter, PromptRows
from tests.held_transfers import HeldTransfers

HEADS, DIM, PAGE, PAGES = 3, 4, 4, 8


@st.composite
def prompts(draw):
    """Token rows of two prompts, at first one after the other, then in any order."""
    ids = draw(st.permutations(range(PAGES * PAGE)))
    count, other = draw(st.integers(1, 20)), draw(st.integers(0, 10))
    if draw(st.booleans()):
        ids = sorted(ids)
    return np.array(ids[:count]), np.array(ids[count : count + other], dtype=np.int64)


def rows_of(ids: np.ndarray, others: np.ndarray) -> PromptRows:
    pages = ids // PAGE
    return PromptRows(pages, ids % PAGE, np.isin(pages, others // PAGE))


@given(prompts=prompts(), page_of=st.permutations(range(PAGES)), at_a_time=st.integers(1, PAGES))
def test_whole_pages_and_single_rows_are_the_same(prompts, page_of, at_a_time):
    mine, theirs = (np.array(page_of)[ids // PAGE] * PAGE + ids % PAGE for ids in prompts)
    before = torch.randn(PAGES, HEADS, PAGE, 2, DIM)
    expected, pages = before.clone(), before.clone()
    k, v = torch.randn(HEADS, len(mine), DIM), torch.randn(HEADS, len(mine), DIM)
    DirectWriter(expected).begin(rows_of(mine, theirs), k, v).finish()

    transfers = HeldTransfers()
    transfers.is_held = True
    writer = PackedWriter(pages, transfers, scratch_bytes=at_a_time * pages[0].nbytes)
    copy = writer.begin(rows_of(mine, theirs), k, v)
    assert not copy.event.query()
    assert torch.equal(pages, before)
    copy.event.synchronize()
    copy.finish()

    flat = [tensor.transpose(1, 2).reshape(-1, HEADS, 2, DIM) for tensor in (pages, expected)]
    assert torch.equal(flat[0][mine], flat[1][mine])
    # Nobody reads the other rows of a page that is the prompt's alone.
    spared = np.setdiff1d(np.arange(PAGES * PAGE), mine)
    alone = np.setdiff1d(mine // PAGE, theirs // PAGE)
    spared = spared[~np.isin(spared // PAGE, alone)]
    assert torch.equal(flat[0][spared], flat[1][spared])
