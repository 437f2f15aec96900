"""Every backend of the kernel contract against the definition written out."""

from __future__ import annotations

import pytest
import torch

from sbot.costs import Cosine, Cost, Lp, MatrixCost, Quadratic
from sbot.kernels import Conditionals, DenseKernel, LogKernel, TiledKernel, make_kernel, store
from sbot.memory import require_memory

from ..conftest import clouds

COSTS = [Quadratic(), Lp(1), Lp(2), Lp(2, power=1.5), Cosine()]


def backends(cost: Cost, x, y) -> dict[str, LogKernel]:
    """Every way to get at the same entries, with tiles small enough that there are several."""
    tiled = TiledKernel(cost, x, y)
    dense = store(tiled)
    strided = DenseKernel(dense.matrix.mT.contiguous().mT)
    small = TiledKernel(cost, x, y)
    for kernel in (dense, strided, small):
        kernel.tile_bytes = 3 * y.shape[-2] * x.element_size()
    return {"tiled": tiled, "small tiles": small, "dense": dense, "strided": strided, "twice transposed": tiled.T.T}


def keeper(kept, most=1000):
    """What `LogKernel.conditionals` is to show its tiles to: copies them, and wants no more than the first rows."""

    def keep(rows: slice, tile) -> bool:
        assert rows.start < most
        kept[..., rows, :].copy_(tile)
        return rows.stop < most

    return keep


def naive(c, bias, eps, values):
    z = bias[..., None, :] - c / eps
    return z.logsumexp(-1), z.softmax(-1) @ values


@pytest.mark.parametrize("cost", COSTS, ids=repr)
@pytest.mark.parametrize("batch", [(), (2,), (2, 3)], ids=str)
def test_reduce_is_the_definition(cost, batch, dtype, device, generator):
    x, y = clouds(13, 17, 3, generator, batch)
    bias = torch.randn(*batch, 17, generator=generator, dtype=torch.float64)
    values = torch.randn(*batch, 17, 4, generator=generator, dtype=torch.float64)
    matrix = cost.matrix(x, y)
    eps = 0.3
    for name, kernel in backends(cost, x.to(device, dtype), y.to(device, dtype)).items():
        for k, c, v, b in ((kernel, matrix, values, bias), (kernel.T, matrix.mT, x, bias[..., :13])):
            lse, avg = k.reduce(b.to(device, dtype), eps, v.to(device, dtype))
            want_lse, want_avg = naive(c, b, eps, v)
            tolerance = 1e-12 if dtype == torch.float64 else 2e-4
            torch.testing.assert_close(lse.double().cpu(), want_lse, rtol=tolerance, atol=tolerance, msg=name)
            torch.testing.assert_close(avg.double().cpu(), want_avg, rtol=tolerance, atol=tolerance, msg=name)


def test_dropped_columns_and_empty_rows(generator):
    x, y = clouds(5, 4, 2, generator)
    bias = torch.tensor([0.0, -torch.inf, 0.5, -torch.inf], dtype=torch.float64)
    c = Quadratic().matrix(x, y)
    want = (bias[[0, 2]] - c[:, [0, 2]] / 0.5).logsumexp(-1)
    for name, kernel in backends(Quadratic(), x, y).items():
        torch.testing.assert_close(kernel.reduce(bias, 0.5)[0], want, msg=name)
    empty = DenseKernel(torch.tensor([[torch.inf, torch.inf], [0.0, 1.0]]))
    lse = empty.reduce(torch.zeros(2), 1.0)[0]
    assert lse[0] == -torch.inf
    assert torch.isfinite(lse[1])


@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_a_common_offset_costs_no_digits(offset, generator):
    x, y = clouds(20, 20, 3, generator)
    bias = torch.zeros(20, dtype=torch.float64)
    want = TiledKernel(Quadratic(), x, y).reduce(bias, 0.1)[0]
    got = TiledKernel(Quadratic(), x + offset, y + offset).reduce(bias, 0.1)[0]
    torch.testing.assert_close(got, want, rtol=1e-7, atol=1e-7)


def test_far_underflow_is_exact(generator):
    """Logits thousands of e-folds apart, in float32."""
    x = torch.zeros(1, 1)
    y = torch.tensor([[0.0], [20.0], [100.0]])
    for name, kernel in backends(Quadratic(), x, y).items():
        lse, avg = kernel.reduce(torch.zeros(3), 1.0, y)
        assert abs(float(lse)) < 1e-3, name
        assert float(avg) == 0, name


@pytest.mark.parametrize("cost", COSTS, ids=repr)
def test_gradients_are_the_definition_s(cost, generator):
    x, y = clouds(7, 9, 2, generator)
    bias = torch.randn(9, generator=generator, dtype=torch.float64)
    values = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    leaves = [t.requires_grad_() for t in (x, y, bias, values)]
    lse, avg = naive(cost.matrix(x, y), bias, 0.4, values)
    want = torch.autograd.grad(lse.sin().sum() + avg.cos().sum(), leaves)
    kernel = TiledKernel(cost, x, y)
    kernel.tile_bytes = 2 * 9 * 8
    lse, avg = kernel.reduce(bias, 0.4, values)
    got = torch.autograd.grad(lse.sin().sum() + avg.cos().sum(), leaves)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("cost", COSTS, ids=repr)
def test_scale(cost, generator):
    x, y = clouds(11, 12, 3, generator)
    c = cost.matrix(x, y)
    for name, kernel in backends(cost, x, y).items():
        mean, top = kernel.scale()
        torch.testing.assert_close(mean, c.abs().mean(), msg=name)
        assert top >= c.abs().max() * (1 - 1e-12), name


@pytest.mark.parametrize("cost", COSTS, ids=repr)
@pytest.mark.parametrize("power", [0.0, 0.3])
@pytest.mark.parametrize("batch", [(), (2,)], ids=str)
@pytest.mark.parametrize("eps", [0.3, 1e-3])
def test_one_pass_is_the_plan_written_out(cost, power, batch, eps, generator):
    x, y = clouds(11, 12, 3, generator, batch)
    a = torch.rand(*batch, 11, generator=generator, dtype=torch.float64)
    bias = torch.randn(*batch, 12, generator=generator, dtype=torch.float64)
    a[..., 3], bias[..., 5] = 0, -torch.inf
    logits = bias[..., None, :] - cost.matrix(x, y) / eps
    lse = logits.logsumexp(-1)
    rows = a * torch.exp(power * lse)
    law = logits.softmax(-1)
    for name, kernel in backends(cost, x, y).items():
        for scaled in (False, True):
            if scaled:
                kernel.scale()
                assert kernel._flat(bias, eps) == (eps == 0.3), name
            kept = torch.zeros_like(law)
            seen = kernel.conditionals(bias, eps, a, power, keeper(kept))
            for got, want in zip((*seen[:3], kept), (lse, rows, (rows[..., None] * law).sum(-2), law), strict=True):
                torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-14, msg=name)


@pytest.mark.parametrize("level", [-700.0, 700.0])
@pytest.mark.parametrize("where", ["bias", "cost", "both"])
def test_logits_that_are_close_and_far_from_zero(level, where, dtype, generator):
    """Nothing overflows where all entries of a pass are alike and large, of either sign."""
    c = torch.rand(11, 12, generator=generator, dtype=torch.float64)
    bias = torch.rand(12, generator=generator, dtype=torch.float64)
    bias = bias + (level if where != "cost" else 0)
    c = c - (level if where != "bias" else 0)
    kernel = DenseKernel(c.to(dtype))
    kernel.scale()
    want = (bias - c).logsumexp(-1)
    seen = kernel.conditionals(bias.to(dtype), 1.0, torch.ones(11, dtype=dtype), 0)
    torch.testing.assert_close(seen.lse.double(), want, rtol=1e-12 if dtype == torch.float64 else 1e-6, atol=0)
    columns = (bias - c).softmax(-1).sum(0)
    torch.testing.assert_close(seen.columns, columns, rtol=1e-11 if dtype == torch.float64 else 1e-3, atol=0)


def test_the_size_of_tiles_is_kept(generator):
    x, y = clouds(6, 7, 2, generator, (3,))
    for kernel in backends(Quadratic(), x, y).values():
        kernel.tile_bytes = 8 * 7 * 3 * 2
        leaves = [leaf.clone() for leaf in kernel.leaves]
        for other in (kernel.T, kernel.take(torch.tensor([0, 2])), kernel.on(leaves)):
            assert other.tile_bytes == kernel.tile_bytes


def test_a_pass_adds_up_many_tiles_and_shows_no_more_than_is_wanted(generator):
    """Sums of columns in single precision over more rows than are added up at a time."""
    x, y = clouds(1000, 7, 2, generator)
    kernel = TiledKernel(Quadratic(), x.float(), y.float())
    kernel.tile_bytes = 4 * 7 * 50
    a, bias = torch.full((1000,), 1e-3), torch.zeros(7)
    law = (-Quadratic().matrix(x, y) / 0.5).softmax(-1)
    kept = torch.zeros(1000, 7)
    seen = kernel.conditionals(bias, 0.5, a, 0, keeper(kept, 300))
    torch.testing.assert_close(seen.columns, law.sum(0) / 1000, rtol=3e-7, atol=0)
    torch.testing.assert_close(kept[:300], law[:300].float(), rtol=1e-5, atol=1e-7)
    assert not kept[300:].any()


@pytest.mark.parametrize(("size", "spread"), [(40, 1.0), (400, 1.0), (400, 1e-3), (700, 1.0), (700, 1e-4)])
def test_conditionals_are_the_matrix_they_were_shown(size, spread, generator):
    """Dense in double, dense in single and sparse; also where the entries stop being few halfway."""
    z = torch.randn(size, size + 9, generator=generator, dtype=torch.float64) / spread
    if spread < 1:
        z[-size // 3 :] *= spread if size == 400 else 1
    law = z.softmax(-1)
    kernel = DenseKernel(law)
    model = Conditionals(kernel, 2**30)
    model.open()
    for start in range(0, size, 37):
        model.keep(slice(start, min(start + 37, size)), law[start : start + 37].clone())
    assert model.close()
    assert model.sparse == (size == 700 and spread < 1)
    assert model.exact == (size < 512)
    u, v = torch.rand(size, generator=generator).double(), torch.rand(size + 9, generator=generator).double()
    accuracy = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(model.times(v), law @ v, **accuracy)
    torch.testing.assert_close(model.transposed_times(u), law.T @ u, **accuracy)
    torch.testing.assert_close(model.squares(u), (law**2).T @ u, **accuracy)


def in_between(law, least):
    """Entries that are neither 0 nor as large as ``least``."""
    return int(((law > 0) & (law < least)).count_nonzero())


def test_nothing_denormal_is_multiplied(generator):
    """Denormal numbers cost some processors a hundred times as much: single precision has 0 in their place."""
    x, y = clouds(600, 600, 2, generator)
    eps, bias = 0.02, torch.zeros(600, dtype=torch.float64)
    law = (-Quadratic().matrix(x, y) / eps).softmax(-1)
    tiny = torch.finfo(torch.float32).tiny
    assert in_between(law.float(), tiny) > 0
    model = Conditionals(DenseKernel(law), 2**30)
    model.open()
    assert model.keep(slice(0, 600), law.clone())
    assert model.close() and model.dense.dtype == torch.float32 and not model.sparse
    assert in_between(model.dense, 1e-22) == 0
    assert in_between(model.dense.square(), tiny) > 0  # which `squares` leaves out
    weight = torch.rand(600, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(model.squares(weight), (law**2).mT @ weight, rtol=1e-5, atol=1e-12)
    # never more than the column has of the plan, however little that is
    model.dense[:, 0] = 1e-20
    assert float(model.squares(weight)[0]) <= 1e-20 * float(model.transposed_times(weight)[0]) * (1 + 1e-5)
    for name, kernel in backends(Quadratic(), x.float(), y.float()).items():
        lse = kernel.reduce(bias.float(), eps)[0]
        got = torch.cat([tile.clone() for _, tile in kernel.softmax_tiles(bias.float(), eps, lse)])
        assert in_between(got, 1e-28) == 0, name
        torch.testing.assert_close(got.double(), law, rtol=2e-4, atol=1e-27, msg=name)


def test_what_is_forbidden_is_zero_in_single_precision():
    kernel = DenseKernel(torch.tensor([[0.0, torch.inf], [1.0, 0.0]]))
    lse = kernel.reduce(torch.zeros(2), 0.1)[0]
    _, tile = next(kernel.softmax_tiles(torch.zeros(2), 0.1, lse))
    assert float(tile[0, 1]) == 0


def test_a_model_is_double_where_it_is_small_or_few_iterations_are_expected():
    for size, few, kept in ((500, False, torch.float64), (600, False, torch.float32), (600, True, torch.float64)):
        kernel = DenseKernel(torch.zeros(size, size, dtype=torch.float64))
        model = Conditionals(kernel, 2**30, few)
        assert model.dense.dtype == model.like(kernel).dense.dtype == kept
    assert Conditionals(kernel, 4 * 600 * 600, few=True).dense.dtype == torch.float32  # where it has room


def test_without_room_only_a_sparse_model_or_none_is_kept(generator):
    kernel = DenseKernel(torch.zeros(600, 600, dtype=torch.float64))
    model = Conditionals(kernel, 600 * 64)
    assert model.dense is None
    for law, fits in ((torch.eye(600).double(), True), (torch.full((600, 600), 1 / 600).double(), False)):
        model.open()
        for start in range(0, 600, 100):
            model.keep(slice(start, start + 100), law[start : start + 100])
        assert model.close() == fits
    assert not Conditionals(kernel, 0).possible


def test_scale_leaves_forbidden_pairs_out():
    mean, top = DenseKernel(torch.tensor([[1.0, torch.inf], [3.0, 2.0]])).scale()
    assert float(mean) == 2.0
    assert float(top) == 3.0


def test_the_budget_decides(generator):
    x, y = clouds(10, 10, 2, generator)
    assert isinstance(make_kernel(Lp(1), x, y, memory=2 * 100 * 8), DenseKernel)
    assert isinstance(make_kernel(Lp(1), x, y, memory=2 * 100 * 8 - 1), TiledKernel)
    # what is computed as quickly as read is not stored
    assert isinstance(make_kernel(Quadratic(), x, y, memory=2**30), TiledKernel)
    wide = clouds(10, 10, 40, generator)
    kernel = make_kernel(Quadratic(), *wide, memory=2**30)
    assert isinstance(kernel, DenseKernel)
    torch.testing.assert_close(kernel.matrix, Quadratic().matrix(*wide), rtol=1e-12, atol=1e-12)
    matrix = MatrixCost(torch.zeros(3, 4))
    kernel = make_kernel(matrix, torch.arange(3), torch.arange(4))
    assert isinstance(kernel, DenseKernel)
    assert kernel.matrix is matrix.values  # no copy


def test_memory_is_refused_before_it_is_taken():
    with pytest.raises(MemoryError, match=r"a plan needs .* GiB .* are free; ask for less"):
        require_memory(2**60, torch.device("cpu"), "a plan", "ask for less")
    require_memory(8, torch.device("cpu"), "a plan", "ask for less")


def test_reduced_precision_products_are_not_used(generator):
    """A caller's wish for bfloat16 products must not reach the kernel, and must survive it."""
    x, y = (t.float() for t in clouds(64, 64, 32, generator))
    bias = torch.zeros(64)
    want = TiledKernel(Quadratic(), x, y).reduce(bias, 0.5, y)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        got = TiledKernel(Quadratic(), x, y).reduce(bias, 0.5, y)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("case", ["diagonal", "first column"])
def test_few_entries_are_few_wherever_they_are(case):
    """Entries that matter on a line which regular steps through memory would follow: the model is sparse all the same."""
    if case == "diagonal":
        x = torch.arange(4096.0)[:, None]
        kernel: LogKernel = TiledKernel(Quadratic(), x, x + 0.1)
        kernel.tile_bytes, eps = 2**27, 0.01
    else:
        generator = torch.Generator().manual_seed(0)
        c = torch.rand(4100, 255, generator=generator, dtype=torch.float64) * 50 + 50
        c[:, 0] = 0
        c[torch.arange(4100), 1 + torch.arange(4100) % 254] = 0
        kernel, eps = DenseKernel(c), 0.5
    n, m = kernel.shape
    model = Conditionals(kernel, 2**30)
    if not model.sparse_works:
        pytest.skip("sparse products need MKL")
    model.open()
    kernel.conditionals(
        torch.zeros(m, dtype=kernel.dtype), eps, torch.full((n,), 1 / n, dtype=kernel.dtype), 0, model.keep
    )
    assert model.close() and model.sparse


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("eps", [1.0, 1e-3])
@pytest.mark.parametrize("shape", [(200, 180), (4, 60, 150)])
def test_large_reductions_with_and_without_their_largest_taken_away(dtype, eps, shape, generator):
    """Beyond `MANY` entries exponentials do without it where nothing can be out of range, columns without weight included."""
    *batch, n, m = shape
    x, y = (part.to(dtype) for part in clouds(n, m, 2, generator, tuple(batch)))
    bias = torch.randn(*batch, m, generator=generator, dtype=torch.float64).to(dtype)
    bias[..., ::7] = -torch.inf
    values = torch.randn(*batch, m, 2, generator=generator, dtype=torch.float64).to(dtype)
    for cost in (Quadratic(), Lp(2)):
        c = cost.matrix(x.double(), y.double())
        known = make_kernel(MatrixCost(c.to(dtype)), torch.arange(n), torch.arange(m))
        for kernel in (TiledKernel(cost, x, y), known, known.T.T):
            near = 1e-10 if dtype == torch.float64 else 2e-5 * max(1.0, float(c.max()) / eps)
            got, wanted = kernel.reduce(bias, eps, values), naive(c, bias.double(), eps, values.double())
            torch.testing.assert_close(got[0].double(), wanted[0], rtol=near, atol=near)
            torch.testing.assert_close(got[1].double(), wanted[1], rtol=near, atol=near)
        assert known._flat(bias, eps) == (eps == 1.0)


@pytest.mark.parametrize("cost", COSTS, ids=repr)
@pytest.mark.parametrize("flipped", [False, True])
def test_a_gradient_that_is_not_wanted_changes_no_other(cost, flipped, generator):
    x, y = clouds(6, 5, 2, generator)
    grads = []
    for asks in ((True, True), (True, False), (False, True)):
        leaves = [part.clone().requires_grad_(ask) for part, ask in zip((x, y), asks, strict=True)]
        kernel = TiledKernel(cost, *leaves)
        kernel = kernel.T if flipped else kernel
        bias = torch.zeros(kernel.shape[1], dtype=torch.float64)
        kernel.reduce(bias, 0.7)[0].square().sum().backward()
        grads.append([leaf.grad for leaf in leaves])
    both, first, second = grads
    torch.testing.assert_close(first[0], both[0])
    torch.testing.assert_close(second[1], both[1])
    assert first[1] is None and second[0] is None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_problems_with_one_matrix_are_worked_out_with_one_kernel(dtype, generator):
    """A pass, the model it leaves and its plan are those of each problem by itself; the kernel is made once."""
    c = 5 * torch.rand(30, 40, generator=generator, dtype=dtype)
    bias = torch.randn(3, 40, generator=generator, dtype=dtype)
    a = torch.rand(3, 30, generator=generator, dtype=dtype)
    a[0, 4], bias[1, 5] = 0, -torch.inf
    v, u = torch.rand(3, 40, generator=generator).double(), torch.rand(3, 30, generator=generator).double()
    rtol, atol = (1e-12, 1e-15) if dtype == torch.float64 else (2e-6, 1e-7)

    def found(kernel: DenseKernel, bias: torch.Tensor, a: torch.Tensor, v: torch.Tensor, u: torch.Tensor):
        model = Conditionals(kernel, 2**30)
        model.open()
        seen = kernel.conditionals(bias, 0.5, a, 0.3, model.keep, model.room)
        assert model.close(seen, bias)
        products, laws = (model.times(v), model.transposed_times(u), model.squares(u)), model.lent(kernel, 0.5)
        plan = None if laws is None else laws.scaled(*laws.scales(a.log(), bias))
        return seen, (*seen[:3], *products, plan), model

    kernel, lone = DenseKernel(c, (3,)), DenseKernel(c)
    kernel.ends = lone.ends = tuple(map(float, c.aminmax()))
    whole, together, model = found(kernel, bias, a, v, u)
    assert whole.shared is not None and whole.shared.shape == c.shape
    assert model.exact == (dtype == torch.float64) and (together[-1] is not None) == model.exact
    for k in range(3):
        alone, each, _ = found(lone, bias[k], a[k], v[k], u[k])
        assert alone.shared is None
        for one, other in zip(together, each, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one[k].double(), other.double(), rtol=rtol, atol=atol)
    made = kernel.gibbs(bias, 0.5)
    assert made is whole.shared and kernel.gibbs(bias, 0.25) is not made
    # costs of their own, an eps of their own, and what would underflow
    assert DenseKernel(c.expand(3, -1, -1)).gibbs(bias, 0.5) is None
    assert kernel.gibbs(bias, torch.full((3,), 0.5, dtype=dtype)) is None
    assert kernel.gibbs(bias, 1e-4) is None
