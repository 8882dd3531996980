"""What operators move, by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.operators import Operator, product_bytes, record, total_bytes, without_memory


def moving(operators: list[Operator]) -> dict[str, int]:
    """Returns the bytes by operator, of those that move any; in order, all of different names."""
    found = [(operator.name, operator.bytes) for operator in operators if not operator.is_free]
    assert len(dict(found)) == len(found)
    return dict(found)


def test_inputs_and_outputs_count_once() -> None:
    a, b = torch.empty(2, 3), torch.empty(3, 5)
    assert moving(record(lambda: a @ b)) == {"aten.mm": 4 * (6 + 15 + 10)}
    assert moving(record(lambda: a.bfloat16())) == {"aten._to_copy": 6 * (4 + 2)}
    assert product_bytes(record(lambda: (a @ b).relu())) == 4 * (6 + 15 + 10)


def test_views_and_allocations_are_free() -> None:
    x = torch.empty(2, 3, 4)
    operators = record(
        lambda: [x.view(6, 4).t()[1:], torch.empty_like(x), x.detach(), x.flatten(1), x.expand(5, 2, 3, 4)]
    )
    assert operators
    assert total_bytes(operators) == 0


def test_a_copy_that_looks_like_a_view_is_counted() -> None:
    x = torch.empty(2, 3, 4)
    assert moving(record(lambda: x.transpose(0, 1).reshape(6, 4))) == {"aten.clone": 2 * 4 * 24}


def test_what_is_expanded_is_read_once() -> None:
    x, row = torch.empty(7, 3), torch.empty(3)
    assert moving(record(lambda: row.expand(7, 3) * x)) == {"aten.mul": 4 * (3 + 21 + 21)}


def test_what_changes_in_place_is_written() -> None:
    x, y, z = (torch.empty(10) for _ in range(3))
    assert moving(record(lambda: x.add_(y))) == {"aten.add_": 3 * 40}
    assert moving(record(lambda: torch._foreach_add_([x, y], [y, z]))) == {"aten._foreach_add_": 6 * 40}
    assert moving(record(lambda: torch.add(x, y, out=z))) == {"aten.add": 3 * 40}


@pytest.mark.parametrize("training", [True, False])
def test_a_batch_norm_in_training_reads_its_maps_twice(training: bool) -> None:
    x, norm = torch.empty(2, 3, 4, 4, requires_grad=True), nn.BatchNorm2d(3).train(training)
    maps, small = 4 * 96, 4 * 3
    forward = record(lambda: norm(x))[-1]
    assert forward.name == "aten.native_batch_norm"
    assert forward.bytes == maps * (3 if training else 2) + small * (4 + (2 if training else 0))
    if training:
        out = norm(x)
        backward = [o for o in record(lambda: out.backward(torch.ones_like(out))) if "batch_norm" in o.name]
        assert [o.name for o in backward] == ["aten.native_batch_norm_backward"]
        assert backward[0].bytes == maps * (2 + 2 + 1) + small * (5 + 2)


def test_shapes_alone_move_the_same() -> None:
    def run() -> list[Operator]:
        torch.manual_seed(0)
        x, w = torch.empty(4, 8), torch.empty(5, 8, requires_grad=True)

        def step() -> None:
            with torch.autocast("cpu", torch.bfloat16):
                loss: Tensor = F.linear(x, w).float().sum()
            loss.backward()

        return record(step)

    with without_memory():
        expected = [operator for operator in run() if not operator.is_free]
    assert [operator for operator in run() if not operator.is_free] == expected
    assert sum(operator.is_product for operator in expected) == 2
    assert {operand.dtype for o in expected if o.is_product for operand in o.reads} == {torch.bfloat16}
