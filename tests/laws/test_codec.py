"""Laws of masks and of the codec, for any mask and any numbers."""

from __future__ import annotations

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from polyrank.adapter import embed, num_slots, restrict
from polyrank.gate import decode_update
from polyrank.messages import Training, TrainTask
from polyrank.wire import decode_task, encode_task, encode_update, pack_bits, unpack_bits
from tests.builders import SHAPES, largest_difference, random_adapter, random_head, update_of

RANK = 5
bits = st.lists(st.booleans(), min_size=RANK, max_size=RANK).map(lambda b: torch.tensor(b, dtype=torch.bool))
masks = st.tuples(*[bits] * len(SHAPES)).map(lambda parts: dict(zip(SHAPES, parts, strict=True)))
forms = st.sampled_from(["lora", "svd"])


@given(masks, forms)
def test_restricted_slots_embed_back_where_they_were(mask, form):
    bank, other = random_adapter(0, RANK, form), random_adapter(1, RANK, form)
    assert largest_difference(embed(restrict(bank, mask), mask, bank), bank) == 0
    mixed = embed(restrict(other, mask), mask, bank)
    assert largest_difference(restrict(mixed, mask), restrict(other, mask)) == 0
    outside = {name: ~held for name, held in mask.items()}
    assert largest_difference(restrict(mixed, outside), restrict(bank, outside)) == 0


@given(masks)
def test_packed_bits_come_back(mask):
    packed = pack_bits(mask)
    assert packed.numel() == 2  # 10 slots
    again = unpack_bits(packed, dict.fromkeys(SHAPES, RANK))
    assert all(torch.equal(again[name], held) for name, held in mask.items())


@given(masks, forms, st.integers(0, 2**62), st.text(max_size=30))
def test_messages_come_back_exactly_at_any_mask(mask, form, seed, client):
    held = restrict(random_adapter(seed, RANK, form), mask)
    task = TrainTask(3, client, seed, mask, mask, held, random_head(1), Training())
    again = decode_task(encode_task(task))
    assert isinstance(again, TrainTask)
    assert (again.seed, again.client) == (seed, client)
    assert largest_difference(again.adapter, held) == 0
    reply = update_of(client, random_adapter(seed + 1, RANK, form), mask)
    reply = decode_update(encode_update(replace(reply, round=3), task), task)
    assert largest_difference(reply.adapter, restrict(random_adapter(seed + 1, RANK, form), mask)) == 0
    per_slot = {name: out + in_ + (form == "svd") for name, (out, in_) in SHAPES.items()}
    numbers = sum(int(mask[name].sum()) * size for name, size in per_slot.items())
    assert held.num_parameters() == numbers
    assert num_slots(mask) == sum(int(m.sum()) for m in mask.values())
