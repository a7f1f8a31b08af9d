"""The slot bank: starts at zero, restricts and embeds slots, scales by module."""

from __future__ import annotations

import pytest
import torch

from polyrank.adapter import (
    Factors,
    delta_weight,
    embed,
    full_mask,
    mask_and,
    new_adapter,
    num_slots,
    prefix_mask,
    restrict,
)
from tests.builders import SHAPES, random_adapter


@pytest.mark.parametrize("form", ["lora", "svd"])
def test_a_new_bank_changes_nothing_and_draws_the_same_numbers(form):
    first, again = (new_adapter(SHAPES, form=form, rank=3, scale=2.0, seed=5) for _ in range(2))
    for name, factors in first.modules.items():
        assert (factors.B.shape, factors.A.shape) == ((SHAPES[name][0], 3), (3, SHAPES[name][1]))
        assert torch.equal(delta_weight(factors), torch.zeros(SHAPES[name]))
        assert torch.equal(factors.A, again.modules[name].A)
    assert not torch.equal(first.modules["block.0.q"].A[:, :2], first.modules["block.1.q"].A)


def test_another_module_changes_no_module():
    small = new_adapter({"q": (3, 4)}, form="svd", rank=2, scale=1.0, seed=0)
    large = new_adapter({"p": (2, 2), "q": (3, 4)}, form="svd", rank=2, scale=1.0, seed=0)
    assert torch.equal(small.modules["q"].A, large.modules["q"].A)


def test_delta_weight_by_hand():
    B = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    A = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    assert torch.equal(delta_weight(Factors(B, A, 2.0)), torch.tensor([[2.0, 4.0], [6.0, 8.0]]))
    e = torch.tensor([1.0, -1.0])
    assert torch.equal(delta_weight(Factors(B, A, 2.0, e)), torch.tensor([[2.0, -4.0], [6.0, -8.0]]))


def test_restrict_drops_modules_without_slots_and_embed_puts_slots_back():
    bank, other = random_adapter(0, 3), random_adapter(1, 3)
    mask = {"block.0.q": torch.tensor([True, False, True]), "block.1.q": torch.zeros(3, dtype=torch.bool)}
    held = restrict(other, mask)
    assert list(held.modules) == ["block.0.q"]
    assert held.modules["block.0.q"].rank == 2
    back = embed(held, mask, bank)
    assert torch.equal(back.modules["block.0.q"].A[1], bank.modules["block.0.q"].A[1])
    assert torch.equal(back.modules["block.0.q"].B[:, 2], other.modules["block.0.q"].B[:, 2])
    assert torch.equal(back.modules["block.1.q"].A, bank.modules["block.1.q"].A)


def test_masks():
    bank = random_adapter(0, 3)
    assert num_slots(full_mask(bank)) == 6
    assert num_slots(prefix_mask(bank, 2)) == 4
    tail = {name: torch.tensor([False, True, True]) for name in bank.modules}
    assert num_slots(mask_and(prefix_mask(bank, 2), tail)) == 2
