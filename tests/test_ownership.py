"""Who keeps which layer, and where its numbers lie in a flat buffer; what processes do with it is tested there."""

import copy
import itertools

import pytest
import torch
from models import assert_same, model_and_batches, train
from published import SINGD
from torch import nn

from singd import registered_structures
from singd.processes.collectives import Layout
from singd.processes.ownership import balanced, cost


@pytest.mark.parametrize("ranks", [1, 2, 3, 8])
def test_shares_are_balanced_up_to_the_largest_piece(ranks):
    random = torch.Generator().manual_seed(0)
    for count in (0, 1, 2, 7, 40):
        costs = (torch.rand(count, generator=random) ** 4).tolist()
        loads = [0.0] * ranks
        for piece, owner in zip(costs, balanced(costs, loads), strict=True):
            loads[owner] += piece
        assert max(loads) <= sum(costs) / ranks + max(costs, default=0.0)
        assert max(loads) - min(loads) <= max(costs, default=0.0)


def test_new_pieces_go_where_there_is_least():
    assert balanced([1.0, 1.0, 5.0], [4.0, 0.0, 7.0]) == [0, 0, 1]
    assert balanced([1.0, 1.0], [0.0, 0.0]) == [0, 1]  # as given, where nothing differs


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_pieces_of_a_buffer_do_not_overlap_and_move_no_more_than_needed(ranks):
    for sizes in itertools.product((1, 3, 10), repeat=4):
        for owners in itertools.product(range(ranks), repeat=4):
            layout = Layout.of(sizes, owners, ranks)
            taken = torch.zeros(layout.numel, dtype=torch.int64)
            for offset, size in zip(layout.offsets, sizes, strict=True):
                taken[offset : offset + size] += 1
            assert taken.sum() == sum(sizes) and taken.max() == 1
            shares = [
                sum(s for s, o in zip(sizes, owners, strict=True) if o == r) for r in range(ranks)
            ]
            padded, plain = (ranks - 1) * max(shares), 2 * (ranks - 1) / ranks * sum(sizes)
            if layout.shard_numel is None:
                assert layout.numel == sum(sizes) and padded > plain
                continue
            assert layout.shard_numel == max(shares) and padded <= plain
            for offset, size, owner in zip(layout.offsets, sizes, owners, strict=True):
                assert owner * layout.shard_numel <= offset
                assert offset + size <= (owner + 1) * layout.shard_numel


def test_a_wide_layer_and_a_dense_structure_cost_more():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(64, 4), nn.Linear(64, 64))
    of = {
        name: [cost(b) for b in SINGD(model, structures=(name, name))._blocks]
        for name in registered_structures()
    }
    for costs in of.values():
        assert costs == sorted(costs)
    assert of["dense"][2] > 10 * of["diagonal"][2]


def test_one_process_keeps_all():
    ends = []
    for shard in (False, True):
        model, batches = model_and_batches("cnn")
        optimizer = SINGD(model, T=2, lr_cov=0.1, shard_factors=shard)
        train(model, optimizer, batches)
        ends += [model, optimizer]
    assert_same(*ends)


def test_a_copy_of_one_rank_is_refused_where_there_is_no_other():
    model, batches = model_and_batches("mlp")
    optimizer = SINGD(model, T=2, shard_factors=True)
    train(model, optimizer, batches[:1])
    before = copy.deepcopy([p.detach() for p in model.parameters()])
    optimizer._ownership.rank, optimizer._ownership.ranks = 1, 4  # as unpickled from there
    for action in (
        optimizer.state_dict,
        optimizer.stats,
        lambda: train(model, optimizer, batches[1:2]),
    ):
        with pytest.raises(
            RuntimeError, match="holds the factors of rank 1 of 4 .* runs on rank 0 of 1"
        ):
            action()
    for p, q in zip(model.parameters(), before, strict=True):
        assert torch.equal(p, q)
