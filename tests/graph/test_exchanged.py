"""Operators cut with rows of other ranks equal the whole operator, in fp64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from meshwright.graph.rules.base import Variant
from tests.graph.one_op import analysis_of, instance
from tests.graph.test_rules import check, rand


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from([8, 9, 12, 16]),
    st.sampled_from([1, 2, 3, 5]),
    st.sampled_from([1, 2, 3]),
    st.integers(0, 2),
    st.sampled_from([1, 2]),
    st.booleans(),
)
def test_halos_of_random_shapes(
    size: int, kernel: int, stride: int, padding: int, dilation: int, groups: bool
) -> None:
    """Both spatial dims, forward and backward, wherever the stride divides them."""
    reach = dilation * (kernel - 1) + 1
    assume(size + 2 * padding >= reach)
    count = 2 if groups else 1
    image, weight, bias = rand(2, 4, size, 12), rand(6, 4 // count, kernel, kernel), rand(6)
    shape = ([stride] * 2, [padding] * 2, [dilation] * 2, False, [0, 0], count)
    forward = instance("aten.convolution.default", image, weight, bias, *shape)
    (out,) = forward.op.results
    check(forward)
    gradient = torch.randn_like(forward.tensors[out])
    check(
        instance(
            "aten.convolution_backward.default",
            *(gradient, image, weight, [6], *shape, [True, True, True]),
        )
    )
    num_rows = forward.graph.values[out].shape[2]

    halos = {f.size for f in analysis_of(forward).leaf_factors[0] if f.halo is not None}
    assert (num_rows in halos) == (num_rows > 1 and size == stride * num_rows)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from([2, 3]), st.sampled_from([2, 3]), st.integers(0, 1))
def test_pools_of_random_shapes(kernel: int, stride: int, padding: int) -> None:
    image = rand(2, 4, 12, 6)
    window = ([kernel] * 2, [stride] * 2, [padding] * 2)
    largest = instance("aten.max_pool2d_with_indices.default", image, *window)
    out, indices = largest.op.results
    check(largest)
    gradient = torch.randn_like(largest.tensors[out])
    check(
        instance(
            "aten.max_pool2d_with_indices_backward.default",
            *(gradient, image, *window, [1, 1], False, largest.tensors[indices]),
        )
    )
    check(instance("aten.avg_pool2d.default", image, *window))
    check(instance("aten.avg_pool2d_backward.default", gradient, image, *window, False, True, None))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_around_a_ring(causal: bool) -> None:
    """Forward and backward; blocks are put together by their log-sum-exp."""
    tensors = [rand(2, 2, 12, 4) for _ in range(3)]
    name = "aten._scaled_dot_product_flash_attention_for_cpu"
    forward = instance(f"{name}.default", *tensors, 0.0, causal)
    (factors,) = analysis_of(forward).leaf_factors

    assert [12] == [f.size for f in factors if f.variant is Variant.RING]
    check(forward)
    out, total = (forward.tensors[value] for value in forward.op.results)
    operands = (torch.randn_like(out), *tensors, out, total)
    check(instance(f"{name}_backward.default", *operands, 0.0, causal))
