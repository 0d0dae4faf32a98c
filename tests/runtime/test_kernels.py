"""Kernels against the plain operation they split."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from meshwright.errors import PlanRefused
from meshwright.runtime import kernels


def _rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_pack_pads_each_tensor() -> None:
    packed = kernels.pack((torch.tensor([[1, 2], [3, 4]]), torch.tensor([5])), (5, 2))

    assert [1, 2, 3, 4, 0, 5, 0] == packed.tolist()


def test_pack_of_one_tensor_copies_nothing() -> None:
    tensor = torch.arange(6.0).view(2, 3)

    assert tensor.data_ptr() == kernels.pack((tensor,), (6,)).data_ptr()


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_gathering_packed_chunks_gives_the_full_tensors(num_ranks: int) -> None:
    """Several tensors along several dims, some padded, cut by ``zero_shard`` and packed."""
    full = [torch.randn(shape, generator=_rng()) for shape in ((5, 3), (2, 7), (4, 3, 2), (1,))]
    dims = [0, 1, 2, 0]
    chunks = [-(-t.shape[d] // num_ranks) for t, d in zip(full, dims, strict=True)]
    shards = []
    for tensor, dim, chunk in zip(full, dims, chunks, strict=True):
        shape = list(tensor.shape)
        shape[dim] = chunk
        shards.append((tuple(shape), dim, tensor.shape[dim]))
    sizes = tuple(torch.Size(shape).numel() for shape, _, _ in shards)
    packs = [
        kernels.pack(
            [kernels.zero_shard(t, d, c, rank) for t, d, c in zip(full, dims, chunks, strict=True)],
            sizes,
        )
        for rank in range(num_ranks)
    ]

    found = kernels.unpack_gathered(torch.cat(packs), num_ranks, shards)
    scattered = kernels.pack_scatter(full, num_ranks, shards)

    for expected, tensor in zip(full, found, strict=True):
        assert torch.equal(expected, tensor)
        assert tensor.is_contiguous()
    assert torch.equal(torch.cat(packs), scattered)


def test_unpack_gives_views() -> None:
    flat = torch.arange(7)
    first, second = kernels.unpack(flat, ((2, 2), (3,)))

    assert [[0, 1], [2, 3]] == first.tolist()
    assert [4, 5, 6] == second.tolist()
    assert flat.data_ptr() == first.data_ptr()


def test_zero_shard_beyond_the_end_is_all_padding() -> None:
    """2 rows in chunks of 1 over 4 ranks: rank 3 holds nothing but zeros."""
    assert [[0.0, 0.0]] == kernels.zero_shard(torch.ones(2, 2), 0, 1, 3).tolist()


def test_zero_unless_keeps_the_first_rank() -> None:
    ones = torch.ones(2)

    assert [1.0, 1.0] == kernels.zero_unless(ones, 0).tolist()
    assert [0.0, 0.0] == kernels.zero_unless(ones, 1).tolist()


@pytest.mark.parametrize("padding_idx", [-1, 5])
@pytest.mark.parametrize("scale_by_freq", [False, True])
def test_embedding_shards_sum_to_the_embedding(padding_idx: int, scale_by_freq: bool) -> None:
    weight = torch.randn((12, 3), generator=_rng(), dtype=torch.float64)
    indices = torch.randint(0, 12, (4, 5), generator=_rng())
    grad = torch.randn((4, 5, 3), generator=_rng(), dtype=torch.float64)
    expected = torch.ops.aten.embedding_dense_backward(
        grad, indices, 12, padding_idx, scale_by_freq
    )

    found = sum(
        kernels.embedding_shard(weight[start : start + 4], indices, start, 4) for start in (0, 4, 8)
    )
    table = torch.cat(
        [
            kernels.embedding_backward_shard(grad, indices, start, 4, padding_idx, scale_by_freq)
            for start in (0, 4, 8)
        ]
    )

    assert torch.equal(F.embedding(indices, weight), found)
    torch.testing.assert_close(expected, table, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("shape", [(6, 8), (3, 8, 2)])
def test_nll_shards_sum_to_the_loss(shape: tuple[int, ...]) -> None:
    """Values and gradients of the summed loss, with an ignored target."""
    logp = torch.randn(shape, generator=_rng(), dtype=torch.float64, requires_grad=True)
    target = torch.randint(0, 8, (shape[0], *shape[2:]), generator=_rng())
    target.view(-1)[0] = -100
    loss = F.nll_loss(logp, target, reduction="sum", ignore_index=-100)
    loss.backward()
    grad_out = torch.ones((), dtype=torch.float64)

    losses, grads = [], []
    for start in (0, 4):
        part = logp.detach()[:, start : start + 4]
        value, num_counted = kernels.nll_forward_shard(part, target, start, 4, -100)
        losses.append(value)
        grads.append(kernels.nll_backward_shard(grad_out, part, target, start, -100))
        assert target.numel() - 1 == num_counted

    torch.testing.assert_close(loss.detach(), sum(losses))
    torch.testing.assert_close(logp.grad, torch.cat(grads, dim=1))


def test_nll_with_class_weights_is_refused() -> None:
    with pytest.raises(PlanRefused, match="class weights cannot be sharded by class"):
        kernels.nll_forward_shard(
            torch.zeros(2, 4), torch.zeros(2, dtype=torch.long), 0, 4, -100, torch.ones(4)
        )


def test_view_falls_back_to_a_copy() -> None:
    """The captured operand was contiguous, the local one is not."""
    view = kernels.resolve_target("aten.view.default")

    assert [0, 3, 1, 4, 2, 5] == view(torch.arange(6).view(2, 3).t(), (6,)).tolist()


@pytest.mark.parametrize("target", ["aten.nothing.default", "meshwright.nothing", "aten.mm"])
def test_unknown_targets_are_refused(target: str) -> None:
    with pytest.raises(PlanRefused, match=f"operator {target}: neither"):
        kernels.resolve_target(target)
