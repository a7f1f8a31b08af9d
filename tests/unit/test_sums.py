"""Means over many updates: the numbers, one pass, and how many updates are held at a time."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Sequence

import pytest
import torch

from polyrank.adapter import Adapter, full_mask, prefix_mask
from polyrank.aggregation import (
    Anchored,
    FedAvg,
    LayerWise,
    NormWeighted,
    RandomSlots,
    RankPartition,
    ReplicationPadding,
    Stacking,
    SvdRedistribution,
    ZeroPadding,
)
from polyrank.aggregation.base import GROUP, SlotSums, slots_first
from polyrank.aggregation.error import aggregation_error
from tests.builders import largest_difference, random_adapter, random_head, state_of, update_of

RANK = 5
MEANS = [
    FedAvg(),
    LayerWise(),
    ZeroPadding(),
    NormWeighted(),
    ReplicationPadding(),
    ReplicationPadding(fill="top"),
    Anchored(space="factor"),
    RandomSlots(),
]
PRODUCTS = [Stacking(), SvdRedistribution(), RankPartition(), Anchored()]


def masks(bank, number):
    """Prefixes, slots in the middle, scattered slots, and one module left out."""
    q, k = bank.modules
    middle, scattered = torch.tensor([0, 1, 1, 0, 0]).bool(), torch.tensor([1, 0, 1, 0, 1]).bool()
    return [
        prefix_mask(bank, 2),
        prefix_mask(bank, RANK),
        {q: middle, k: scattered},
        {q: scattered, k: torch.zeros(RANK, dtype=torch.bool)},
    ][number % 4]


def many(bank, count, dtype=torch.float32):
    updates = []
    for number in range(count):
        update = update_of("c", random_adapter(number, RANK, bank.form), masks(bank, number), 1 + number % 7)
        modules = {
            name: f.with_tensors({part: t.to(dtype) for part, t in f.tensors().items()})
            for name, f in update.adapter.modules.items()
        }
        updates.append(dataclasses.replace(update, adapter=Adapter(bank.form, modules)))
    return updates


def plain(bank, updates, over_holders):
    """Slot by slot in float64."""
    modules = {}
    for name, old in bank.modules.items():
        values = {part: t.double().clone() for part, t in old.tensors().items()}
        for slot in range(RANK):
            own = [u for u in updates if u.mask[name][slot]]
            mass = sum(u.num_examples for u in (own if over_holders else updates))
            for part, value in values.items():
                rows = [
                    u.num_examples
                    * slots_first(u.adapter.modules[name].tensors()[part], part)[u.mask[name][:slot].sum()]
                    for u in own
                ]
                if rows:
                    slots_first(value, part)[slot] = sum(row.double() for row in rows) / mass
        modules[name] = old.with_tensors(values)
    return Adapter(bank.form, modules)


def summed(bank, updates):
    sums = SlotSums(bank)
    for update in updates:
        sums.add(update, update.num_examples)
    return sums


@pytest.mark.parametrize("form", ["lora", "svd"])
@pytest.mark.parametrize("count", [1, 3, 4 * GROUP + 3])
def test_sums_are_the_plain_means(form, count):
    bank = random_adapter(99, RANK, form)
    updates = many(bank, count)
    assert largest_difference(summed(bank, updates).mean(), plain(bank, updates, True)) < 1e-5
    assert largest_difference(summed(bank, updates).mean_with_zeros(), plain(bank, updates, False)) < 1e-5


def test_bf16_updates_lose_nothing_more():
    bank = random_adapter(99, RANK)
    updates = many(bank, 4 * GROUP + 3, torch.bfloat16)
    mean = summed(bank, updates).mean()
    assert {t.dtype for f in mean.modules.values() for t in f.tensors().values()} == {torch.float32}
    assert largest_difference(mean, plain(bank, many(bank, 4 * GROUP + 3), True)) > 1e-5  # bf16 is coarse
    wide = [dataclasses.replace(u, adapter=widened(u.adapter)) for u in updates]
    assert largest_difference(mean, plain(bank, wide, True)) < 1e-5


def widened(adapter):
    modules = {
        name: f.with_tensors({part: t.float() for part, t in f.tensors().items()})
        for name, f in adapter.modules.items()
    }
    return Adapter(adapter.form, modules)


def test_one_order_gives_the_same_bits_and_another_the_same_numbers():
    bank = random_adapter(99, RANK)
    updates = many(bank, 3 * GROUP)
    first = summed(bank, updates).mean()
    assert largest_difference(first, summed(bank, updates).mean()) == 0
    assert 0 < largest_difference(first, summed(bank, updates[::-1]).mean()) < 1e-5


def test_the_share_of_a_slot_is_that_of_its_holders():
    bank = random_adapter(99, RANK)
    first, second = prefix_mask(bank, 2), full_mask(bank)
    updates = [update_of("a", bank, first, num_examples=1), update_of("b", bank, second, num_examples=3)]
    for share in summed(bank, updates).shares().values():
        assert share.tolist() == [1.0, 1.0, 0.75, 0.75, 0.75]


class Decoded(Sequence):
    """Updates that come into being when they are read, as those decoded from bytes do."""

    def __init__(self, count, rank):
        self.count, self.rank = count, rank
        self.read, self.alive, self.most = [], weakref.WeakSet(), 0

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if not 0 <= index < self.count:
            raise IndexError(index)
        self.read.append(index)
        bank = random_adapter(index, self.rank)
        update = update_of("c", bank, head=random_head(99), num_examples=1 + index)
        self.alive.add(update.adapter.modules["block.0.q"].A)
        self.most = max(self.most, len(self.alive))
        return update


@pytest.mark.parametrize("rule", MEANS, ids=repr)
def test_mean_rules_read_each_update_once_and_hold_few(rule):
    updates = Decoded(5 * GROUP, RANK)
    rule.aggregate(state_of(random_adapter(99, RANK)), updates)
    assert updates.read == list(range(5 * GROUP))
    assert updates.most <= GROUP + 1


@pytest.mark.parametrize("rule", PRODUCTS, ids=repr)
def test_product_rules_hold_all_updates_and_read_each_once(rule):
    updates = Decoded(GROUP, RANK)
    rule.aggregate(state_of(random_adapter(99, RANK)), updates)
    assert updates.read == list(range(GROUP))


@pytest.mark.parametrize("rule", [*MEANS, *PRODUCTS], ids=repr)
def test_heads_are_averaged_by_examples(rule):
    bank = random_adapter(99, RANK)
    updates = [
        update_of("a", random_adapter(1, RANK), num_examples=1, head=random_head(1)),
        update_of("b", random_adapter(2, RANK), num_examples=3, head=random_head(2)),
    ]
    for name, value in rule.aggregate(state_of(bank), updates).head.items():
        assert torch.allclose(value, (updates[0].head[name] + 3 * updates[1].head[name]) / 4)


def test_the_top_rank_pads_only_what_it_holds():
    """The highest rank holds all of q and nothing of k, where the mean of the others stands."""
    bank = random_adapter(99, RANK)
    q, k = bank.modules
    none, one, every = (torch.arange(RANK) < slots for slots in (0, 1, RANK))
    top = update_of("a", random_adapter(1, RANK), {q: every, k: none})
    low = [update_of("b", random_adapter(number, RANK), {q: one, k: one}) for number in (2, 3)]
    merged = ReplicationPadding(fill="top").aggregate(state_of(bank), [*low, top]).adapter.modules
    others = sum(update.adapter.modules[k].A[0] for update in low) / 2
    assert torch.allclose(merged[k].A[0], others)
    assert torch.equal(merged[k].A[1:], bank.modules[k].A[1:])
    assert torch.allclose(merged[q].A[1:], top.adapter.modules[q].A[1:])


def test_clients_of_many_ranks_do_not_pile_up():
    bank = random_adapter(99, RANK)
    sums, alive, most = SlotSums(bank), weakref.WeakSet(), 0
    for number in range(10 * GROUP):
        mask = {name: (torch.tensor(number) >> torch.arange(RANK)) % 2 == 0 for name in bank.modules}
        update = update_of("c", random_adapter(number, RANK), mask)
        if update.adapter.modules:
            alive.add(update.adapter.modules["block.0.q"].A)
            sums.add(update, 1.0)
        del update
        most = max(most, len(alive))
    assert 2 * GROUP < most < 3 * GROUP  # half the slots each, so twice as many as of full ones


def test_norm_weights_fall_back_to_equal_ones():
    """Two passes, in the round in which all products are still zero."""
    bank = random_adapter(99, RANK)
    zero = [
        update_of("a", scaled(random_adapter(1, RANK), 0.0), head=random_head(99)),
        update_of("b", scaled(random_adapter(2, RANK), 0.0), head=random_head(99), num_examples=90),
    ]
    merged = NormWeighted().aggregate(state_of(bank), zero).adapter
    for name, factors in merged.modules.items():
        expected = (zero[0].adapter.modules[name].A + zero[1].adapter.modules[name].A) / 2
        assert torch.allclose(factors.A, expected)


def scaled(adapter, factor):
    """The adapter with B times a number."""
    modules = {
        name: f.with_tensors({**f.tensors(), "B": f.B * factor}) for name, f in adapter.modules.items()
    }
    return Adapter(adapter.form, modules)


def test_the_error_reads_each_update_once_and_holds_few():
    bank, updates = random_adapter(99, RANK), Decoded(5 * GROUP, RANK)
    merged = FedAvg().aggregate(state_of(bank), updates)
    updates.read, updates.most = [], 0
    assert aggregation_error(bank, full_mask(bank), merged, updates, False) > 0
    assert updates.read == list(range(5 * GROUP))
    assert updates.most <= 2
