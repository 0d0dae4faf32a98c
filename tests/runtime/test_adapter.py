"""What the runtime needs of private torch interfaces; fails at once where a new torch differs."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import fx

from meshwright.runtime import adapter


def test_boxed_code_empties_its_list() -> None:
    graph = fx.Graph()
    left, right = graph.placeholder("left"), graph.placeholder("right")
    graph.output((graph.call_function(torch.ops.aten.add.Tensor, (left, right)),))
    module, run = adapter.boxed_callable(graph)
    arguments = [torch.ones(2), torch.ones(2)]

    assert [2.0, 2.0] == run(arguments)[0].tolist()
    assert [] == arguments
    assert "torch.ops.aten.add.Tensor" in module.code
    assert [2.0, 2.0] == module([torch.ones(2), torch.ones(2)])[0].tolist()


def test_alias_annotations_tell_views_from_results() -> None:
    aten = torch.ops.aten

    assert adapter.returns_alias(aten.t.default)
    assert adapter.returns_alias(aten.reshape.default)
    assert adapter.returns_alias(aten.add_.Tensor)
    assert not adapter.returns_alias(aten.mm.default)
    assert (True, True, True) == adapter.op_returns(aten.native_layer_norm.default)
    assert (False,) == adapter.op_returns(aten.split.Tensor)


def test_a_fake_process_group_impersonates_any_rank() -> None:
    with adapter.fake_process_group(rank=4097, world_size=5000), adapter.fake_mode():
        name = dist.new_group([4097, 4098], use_local_synchronization=True).group_name
        op = adapter.functional_collective("all_gather_into_tensor")
        gathered = adapter.wait_tensor()(op(torch.empty(3, 2), 2, name))

        assert (6, 2) == tuple(gathered.shape)
        assert 4097 == dist.get_rank()
        assert "all_gather" == adapter.COLLECTIVE_OPS[op]
    assert not dist.is_initialized()


def test_in_place_reduction_exists() -> None:
    assert "all_reduce" == adapter.COLLECTIVE_OPS[adapter.functional_collective("all_reduce_")]
