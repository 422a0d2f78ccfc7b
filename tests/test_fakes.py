"""Remembered results of operators on fake tensors are those that the fake kernels give."""

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from fullres.engine import fakes
from fullres.engine.fakes import Remembered
from fullres.ops.conv_fwd import conv2d_fwd


class Calling(TorchDispatchMode):
    """Every operator on fake tensors of a mode of its own, through Remembered."""

    def __init__(self, **options):
        super().__init__()
        self.fake = FakeTensorMode(**options)
        self.run = Remembered(self.fake)

    def __enter__(self):
        self.fake.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.fake.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.run(func, args, kwargs or {})


@pytest.fixture(autouse=True)
def forgotten(monkeypatch):
    """Each test begins without a memory."""
    monkeypatch.setattr(Remembered, "_results", {})


def convolved(x: Tensor) -> tuple[Tensor, ...]:
    none = (None, None, None, "none", 0.01, "none", None, None, "none", 0.0, "none")
    weight = torch.empty(6, x.shape[1], 3, 3)
    return conv2d_fwd(x, *none, weight, None, (1, 1), (1, 1), (1, 1), 1, True, False)


# What an operator makes of these, one after the other, must not be taken from one another.
CASES = {
    "1 and 1.0 and True": lambda: [torch.empty(3, dtype=torch.int64) + n for n in (1, 1.0, True)],
    "strides": lambda: [t + 1 for t in (torch.empty(4, 4), torch.empty(4, 4).t())],
    "dtypes": lambda: [torch.empty(3, dtype=d) * 2.0 for d in (torch.half, torch.float64)],
    "devices": lambda: [torch.zeros_like(torch.empty(3, device=d)) for d in ("cpu", "cuda:0")],
    "sizes": lambda: [torch.empty(n).exp() for n in (3, 4, 0)],
    "lists": lambda: [torch.cat([torch.empty(n, 2), torch.empty(3, 2)]) for n in (1, 3)],
    "several results": lambda: torch.empty(4, 5).max(1),
    "memory formats": lambda: [
        torch.empty(2, 3, 4, 5).to(torch.float64, memory_format=f)
        for f in (torch.channels_last, torch.preserve_format)
    ],
    "ours": lambda: [
        t for n in (2, 3) for t in convolved(torch.empty(n, 4, 5, 6)) + convolved(
            torch.empty(n, 4, 5, 6).contiguous(memory_format=torch.channels_last))
    ],
}  # fmt: skip


def described(tensors) -> list[tuple]:
    return [(t.shape, t.stride(), t.dtype, t.device, t.storage_offset(),
             t.untyped_storage().nbytes(), type(t)) for t in tensors]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_results_are_the_kernels_own(case):
    with FakeTensorMode(), torch.no_grad():
        expected = described(CASES[case]())
    for _ in range(2):  # also from what another mode has found
        with Calling() as calling, torch.no_grad():
            for _ in range(2):
                found = CASES[case]()
                assert described(found) == expected
                assert len({t.untyped_storage()._cdata for t in found}) == len(found)
                assert {t.fake_mode for t in found} == {calling.fake}
    assert {kind[-1] for kind in expected} == {FakeTensor}


def test_a_kernel_is_asked_once():
    asked = []
    with FakeTensorMode() as mode, torch.no_grad():
        run = Remembered(mode)
        x = torch.empty(3, 4)

        def call(func, args):
            before = len(run._results)
            out = run(func, args, {})
            asked.append(len(run._results) - before)
            return out

        one = call(torch.ops.aten.exp.default, (x,))
        two = call(torch.ops.aten.exp.default, (x,))
        call(torch.ops.aten.exp.default, (torch.empty(4, 3),))
    assert asked == [1, 0, 1] and one is not two


def test_memory_ends_somewhere(monkeypatch):
    monkeypatch.setattr(fakes, "_MOST", 3)
    with Calling(), torch.no_grad():
        for n in (1, 2, 3, 4, 4, 1):
            assert torch.empty(n).exp().shape == (n,)
            assert len(Remembered._results) <= 3


def test_the_default_type_is_part_of_what_is_given():
    with Calling():
        assert torch.empty(3).dtype == torch.float32
        torch.set_default_dtype(torch.float64)
        try:
            assert torch.empty(3).dtype == torch.float64
        finally:
            torch.set_default_dtype(torch.float32)


def test_writing_in_place_returns_what_is_written():
    with Calling(), torch.no_grad():
        for _ in range(2):
            x, y = torch.empty(3), torch.empty(3)
            assert x.add_(y) is x and x.mul_(2.0) is x
            with pytest.raises(RuntimeError, match="broadcast"):
                x.add_(torch.empty(4))


def test_views_share_and_resizing_resizes_each_time():
    with Calling(), torch.no_grad():
        for _ in range(2):
            x = torch.empty(3, 4)
            for view in (x.detach(), x.t(), torch.ops.aten._unsafe_view.default(x, [12])):
                assert view.untyped_storage()._cdata == x.untyped_storage()._cdata
            x.resize_(10, 10)
            assert x.shape == (10, 10) and x.untyped_storage().nbytes() == 400
            x.unsqueeze_(0)
            assert x.shape == (1, 10, 10)
            y = torch.empty(1, 10, 10)
            x.set_(y)
            assert x.untyped_storage()._cdata == y.untyped_storage()._cdata


def test_known_values_are_followed():
    """An optimizer's counter of steps has one, which its bias corrections divide by."""
    with Calling(), torch.no_grad():
        unknown = torch.empty(())
        unknown += 1
        counter = torch.tensor(0.0)
        for step in range(3):
            assert counter.item() == step
            counter += 1
        with pytest.raises(Exception, match="item|data-dependent|_local_scalar_dense"):
            unknown.item()


def test_sizes_that_depend_on_values_are_new_each_time():
    with Calling(shape_env=ShapeEnv()), torch.no_grad():
        first, second = (torch.empty(3).nonzero().shape[0] for _ in range(2))
    assert str(first) != str(second)


@torch.library.custom_op("fullres::test_padded", mutates_args=())
def padded(x: Tensor) -> Tensor:
    """Return a tensor of the first of the elements that it allocates."""
    return x.new_empty(2 * x.numel())[: x.numel()]


padded.register_fake(lambda x: x.new_empty(2 * x.numel())[: x.numel()])


def test_a_result_smaller_than_its_storage_is_made_by_its_kernel():
    with Calling(), torch.no_grad():
        for _ in range(2):
            assert padded(torch.empty(10)).untyped_storage().nbytes() == 80
