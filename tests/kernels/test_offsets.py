"""Rows so far on that their place passes 2^31: it must be computed in 64 bits.

Tensors have more than 2^31 numbers, of which few are touched: what nobody touches takes no memory.
The interpreter tells an overflow of 32 bits before an address is made from it.
"""

import mmap

import pytest
import torch
from on_device import DEVICE, assert_close  # first: it skips this file where Triton is missing

from dmoe.ops import fp8 as fp8_ops
from dmoe.ops.activation import activate, activate_weighted_backward
from dmoe.ops.wire import dequantize_rows, quantize_rows

if DEVICE.type == "cuda":
    pytest.skip("memory that nobody touches takes none on a CPU alone", allow_module_level=True)
buffers = pytest.importorskip("dmoe_kernels.buffers")
combine = pytest.importorskip("dmoe_kernels.combine")
configs = pytest.importorskip("dmoe_kernels.configs")
dz = pytest.importorskip("dmoe_kernels.dz")
fp8 = pytest.importorskip("dmoe_kernels.fp8")
fp8_gemm = pytest.importorskip("dmoe_kernels.fp8_gemm")
fp8_up = pytest.importorskip("dmoe_kernels.fp8_up")
gemm = pytest.importorskip("dmoe_kernels.grouped_gemm")
mean_mask = pytest.importorskip("dmoe_kernels.mean_mask")
tiles = pytest.importorskip("dmoe_kernels.tiles")
up = pytest.importorskip("dmoe_kernels.up")
routing = pytest.importorskip("dmoe_kernels.routing")
slots = pytest.importorskip("dmoe_kernels.slots")
capacity = pytest.importorskip("dmoe_kernels.capacity")
wire = pytest.importorskip("dmoe_kernels.wire")
interpreter = pytest.importorskip("triton.runtime.interpreter")

FAR = 2**19
"""A row that lies at 2^31 where rows have WIDTH numbers."""
WIDTH = 2**12
USED = 5
"""Rows from FAR on that are read or written, after FAR rows that are not."""
NARROW = 16
CONFIG = configs._INTERPRETED._replace(block_n=1024, block_k=1024)
DTYPE, TOLERANCE, INT64 = torch.float16, 2e-3, torch.int64


@pytest.fixture(autouse=True)
def _seeded_and_told_of_overflows(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    builder = interpreter.interpreter_builder
    # Triton's own check, which is else in debug builds alone.
    monkeypatch.setattr(builder, "options", interpreter.InterpreterOptions(debug=True))


def sparse(*shape: int, dtype: torch.dtype = DTYPE) -> torch.Tensor:
    """Return zeros that take memory where they are touched."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    try:
        memory = mmap.mmap(-1, torch.Size(shape).numel() * dtype.itemsize, flags=flags)
    except OSError as error:
        pytest.skip(f"no address space for it: {error}")
    return torch.frombuffer(memory, dtype=dtype).view(shape)


def run_only(monkeypatch: pytest.MonkeyPatch, program: int, axis: int = 0) -> None:
    """Let the one program that is started be the last of as many as come before it."""
    builder = interpreter.interpreter_builder
    index, grid = [0, 0, 0], [1, 1, 1]
    index[axis], grid[axis] = program, program + 1
    monkeypatch.setattr(builder, "set_grid_idx", lambda *_: setattr(builder, "grid_idx", index))
    monkeypatch.setattr(builder, "set_grid_dim", lambda *_: setattr(builder, "grid_dim", grid))


def far_rows(width: int, seed: int = 0) -> torch.Tensor:
    """Return rows of which those from FAR on are random."""
    rows = sparse(FAR + USED, width)
    generator = torch.Generator().manual_seed(seed)
    rows[FAR:] = torch.randn(USED, width, generator=generator).to(DTYPE)
    return rows


def matrix(size_n: int, size_k: int) -> torch.Tensor:
    """Return the matrix of one expert."""
    return (torch.randn(1, size_n, size_k) * size_k**-0.5).to(DTYPE)


def one_tile(expert: int = 0, num_experts: int = 1) -> tiles.Tiles:
    """Return the table of the one tile that has the rows from FAR on."""
    table = torch.tensor([[expert], [FAR], [FAR + USED]], dtype=torch.int32)
    offsets = sparse(num_experts + 2, dtype=torch.int32)
    # Where the rows begin and end, if there is one expert, and the number of tiles.
    offsets[0], offsets[-2], offsets[-1] = FAR, FAR + USED, 1
    return tiles.Tiles(table, offsets, CONFIG.block_m)


COUNTS = torch.tensor([USED])


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_up_reads_far_sources(activation: str) -> None:
    parts = 2 if activation == "swiglu" else 1
    x, w = far_rows(WIDTH), matrix(parts * NARROW, WIDTH)
    index = torch.tensor([FAR + 3, FAR])
    z, a = up.up(x, index, torch.ones(2), torch.tensor([2]), w, activation, CONFIG)
    assert_close(z, x[index].double() @ w[0].double().T, TOLERANCE)
    assert_close(a, activate(z.double(), activation), TOLERANCE)


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_up_and_dz_write_far_rows(activation: str) -> None:
    ffn_dim = WIDTH // 2 if activation == "swiglu" else WIDTH
    sources, w_up = torch.randn(4, NARROW).to(DTYPE), matrix(WIDTH, NARROW)
    w_down = matrix(NARROW, ffn_dim)
    index = sparse(FAR + USED, dtype=INT64)
    index[FAR:] = torch.tensor([3, 1, 0, 1, 2])
    gates = sparse(FAR + USED, dtype=torch.float32)
    gates[FAR:] = torch.rand(USED)
    rows, used = sources[index[FAR:]].double(), gates[FAR:].double()
    z, a = up.up(sources, index, gates, COUNTS, w_up, activation, CONFIG, one_tile())
    far = z[FAR:].double()
    assert_close(far, rows @ w_up[0].double().T, TOLERANCE)
    assert_close(a[FAR:], activate(far, activation) * used[:, None], TOLERANCE)
    got = dz.dz(sources, index, z, gates, COUNTS, w_down, activation, CONFIG, one_tile())
    da = rows @ w_down[0].double()
    want_a, want_dz, want_gates = activate_weighted_backward(far, da, used, activation)
    for far, want in zip(got, (want_dz, want_a, want_gates), strict=True):
        assert_close(far[FAR:], want, TOLERANCE)


def test_dz_writes_far_parts_of_gates(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the last of many tiles of columns, which are narrow here."""
    block_n, num_rows = 2, FAR + USED
    ffn_dim = block_n * (WIDTH + 1)
    run_only(monkeypatch, WIDTH)
    dy, w = torch.randn(1, NARROW).to(DTYPE), matrix(NARROW, ffn_dim)
    z, dz_, a = (sparse(num_rows, ffn_dim) for _ in range(3))
    z[FAR:] = torch.rand(USED, ffn_dim)
    gates = sparse(num_rows, dtype=torch.float32)
    parts = sparse(WIDTH + 1, num_rows, dtype=torch.float32)
    index, table = sparse(num_rows, dtype=INT64), one_tile()
    tensors = (dy, w, gates, z, dz_, a, parts, index, table.table_3M, table.offsets)
    form = {"ACTIVATION": "relu", "EVEN_K": True, "EIGHTS": False}
    form |= {"PRECISION": "ieee", "GROUP_M": 1}
    blocks = {"BLOCK_M": CONFIG.block_m, "BLOCK_N": block_n, "BLOCK_K": NARROW}
    dz.dz_kernel[(1,)](*tensors, 1, 1, num_rows, ffn_dim, NARROW, **form, **blocks)
    last = slice(-block_n, None)
    want = (dy.double() @ w[0].double()[:, last] * z[FAR:, last].double()).sum(1)
    assert_close(parts[-1, FAR:], want, TOLERANCE)


def test_dz_reads_far_sources() -> None:
    dy, w = far_rows(WIDTH), matrix(WIDTH, NARROW)
    index = torch.tensor([FAR + 3, FAR])
    z = torch.ones(2, NARROW, dtype=DTYPE)
    got, *_ = dz.dz(dy, index, z, torch.ones(2), torch.tensor([2]), w, "relu", CONFIG)
    assert_close(got, dy[index].double() @ w[0].double(), TOLERANCE)


@pytest.mark.parametrize("transposed", [False, True])
def test_gemm_reads_and_writes_far_rows(transposed: bool) -> None:
    for size_k, size_n in ((WIDTH, NARROW), (NARROW, WIDTH)):
        rows, w = far_rows(size_k), matrix(size_n, size_k)
        got = gemm.grouped_gemm(
            rows,
            w if transposed else w.transpose(1, 2).contiguous(),
            COUNTS,
            transposed=transposed,
            num_rows=len(rows),
            config=CONFIG,
            tiles=one_tile(),
        )
        assert_close(got[FAR:], rows[FAR:].double() @ w[0].double().T, TOLERANCE)


def test_gemm_reads_a_far_matrix() -> None:
    rows, matrices = far_rows(64, seed=1), far_rows(WIDTH).view(-1, 64, 64)
    options = {"transposed": True, "num_rows": len(rows), "config": CONFIG}
    table = one_tile(FAR + 2, len(matrices))
    got = gemm.grouped_gemm(rows, matrices, COUNTS, **options, tiles=table)
    assert_close(got[FAR:], rows[FAR:].double() @ matrices[FAR + 2].double().T, TOLERANCE)


@pytest.mark.parametrize("gather_a", [False, True])
def test_outer_reads_far_rows_and_sources(gather_a: bool) -> None:
    """Of each side in turn."""
    for width_in_order, width_gathered in ((WIDTH, NARROW), (NARROW, WIDTH)):
        in_order, sources = far_rows(width_in_order), far_rows(width_gathered, seed=1)
        index = sparse(FAR + USED, dtype=INT64)
        index[FAR:] = FAR + torch.tensor([3, 1, 0, 1, 2])
        a, b = (sources, in_order) if gather_a else (in_order, sources)
        out = gemm.grouped_outer(
            a,
            b,
            index,
            one_tile().offsets,
            gather_a=gather_a,
            dtype=torch.float32,
            config=CONFIG._replace(block_m=1024, block_k=16),
        )
        pair = (sources[index[FAR:]], in_order[FAR:])
        a, b = (t.double() for t in (pair if gather_a else pair[::-1]))
        assert_close(out[0], a.T @ b, TOLERANCE)


@pytest.mark.parametrize(("experts", "size_m"), [(FAR + 1, 64), (1, FAR + 64)])
def test_outer_writes_far_matrices_and_rows_of_them(
    monkeypatch: pytest.MonkeyPatch, experts: int, size_m: int
) -> None:
    size_n = 64 if experts > 1 else WIDTH
    run_only(monkeypatch, experts * size_m * size_n // 64**2 - 1)
    monkeypatch.setattr(gemm, "num_programs", lambda *_: 1)
    rows, sources = (torch.randn(USED, size).to(DTYPE) for size in (size_m, size_n))
    index = torch.tensor([1, 0, 1, 4, 0])
    offsets = sparse(experts + 2, dtype=torch.int32)
    offsets[-2] = USED
    config = CONFIG._replace(block_m=64, block_n=64, block_k=16)
    options = {"gather_a": False, "dtype": DTYPE, "config": config}
    out = gemm.grouped_outer(rows, sources, index, offsets, **options)
    want = rows.double()[:, -64:].T @ sources.double()[index][:, -64:]
    assert_close(out[-1, -64:, -64:], want, TOLERANCE)


def test_sum_and_fill_read_and_write_far_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    run_only(monkeypatch, FAR)
    x, by_source = far_rows(WIDTH), torch.tensor([FAR + 1, FAR + 3])
    offsets = sparse(FAR + 2, dtype=INT64)
    offsets[FAR + 1] = 2
    summed, filled = sparse(FAR + 1, WIDTH), sparse(FAR + 1, WIDTH)
    block = {"BLOCK_D": WIDTH}
    combine.gather_sum_kernel[(1,)](x, by_source, offsets, summed, WIDTH, BLOCK_J=8, **block)
    assert_close(summed[FAR], x[by_source].double().sum(0), TOLERANCE)
    tokens = sparse(FAR + 1, dtype=INT64)
    tokens[FAR] = FAR + 4
    buffers.fill_kernel[(1,)](x, tokens, filled, WIDTH, **block)
    assert torch.equal(filled[FAR], x[FAR + 4])


def test_wire_reads_and_writes_far_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    run_only(monkeypatch, FAR)
    x = far_rows(WIDTH)
    want = quantize_rows(x[FAR : FAR + 1])
    sent, back = sparse(FAR + USED, want.shape[1], dtype=torch.uint8), sparse(FAR + 1, WIDTH)
    offsets = sparse(FAR + 2, dtype=INT64)
    offsets[FAR + 1] = 2
    rows = torch.tensor([FAR, FAR + 3])
    sizes, blocks = (WIDTH, sent.shape[1]), {"BLOCKS": WIDTH // 128}
    wire.quantize_kernel[(1,)](x, sent, rows, offsets, *sizes, HAS_MAP=True, **blocks)
    assert torch.equal(sent[rows], want.expand(2, -1))
    wire.dequantize_kernel[(1,)](sent, back, *sizes, **blocks)
    assert torch.equal(back[FAR:], dequantize_rows(want, WIDTH, DTYPE))


def test_routing_reads_and_writes_far_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    """All experts are chosen, so that slots lie as far on as logits."""
    experts, block_t = 64, 32
    run_only(monkeypatch, FAR * WIDTH // experts // block_t)
    tokens = FAR * WIDTH // experts + USED
    logits, ids = sparse(tokens, experts, dtype=torch.float32), sparse(tokens, experts, dtype=INT64)
    scores, weights, dlogits = (sparse(tokens, experts, dtype=torch.float32) for _ in range(3))
    logits[-USED:] = torch.randn(USED, experts)
    sizes, blocks = (tokens, experts, experts), {"BLOCK_T": block_t, "BLOCK_E": experts}
    absent = {"HAS_BIAS": False, "HAS_K": False, "HAS_VALID": False}
    routing.select_kernel[(1,)](
        logits, ids, ids, ids, ids, *sizes, SCORE="softmax", **absent, **blocks
    )
    assert torch.equal(ids[-USED:], logits[-USED:].argsort(1, descending=True))
    form = {"SCORE": "softmax", "OVER_CHOICE": False, "NORMALIZE": False, "BLOCK_K": experts}
    routing.weigh_kernel[(1,)](logits, ids, scores, weights, *sizes, 1.0, **form, **blocks)
    want = logits[-USED:].double().softmax(1)
    assert_close(scores[-USED:], want, 1e-6)
    assert_close(weights[-USED:], want.gather(1, ids[-USED:]), 1e-6)
    # Of sum(scores^2) / 2 + sum(weights^2) / 2, which is sum(scores^2).
    given = {"HAS_DSCORES": True, "HAS_DWEIGHTS": True}
    inputs = (logits, ids, scores, weights, dlogits)
    routing.weigh_backward_kernel[(1,)](*inputs, *sizes, 1.0, **form, **given, **blocks)
    far = logits[-USED:].double().requires_grad_()
    far.softmax(1).square().sum().backward()
    assert_close(dlogits[-USED:], far.grad, 1e-5)


def test_positions_of_a_far_group(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, block = 255, slots.BLOCK
    num_blocks = WIDTH // block
    run_only(monkeypatch, FAR * num_blocks + 1)
    ids, positions = sparse(FAR + 1, WIDTH, dtype=INT64), sparse(FAR + 1, WIDTH, dtype=torch.int32)
    counts = sparse(FAR + 1, experts + 1, num_blocks, dtype=torch.int32)
    ids[FAR, block : 2 * block : 2] = 7
    sizes = (WIDTH, experts, num_blocks)
    slots.count_kernel[(1,)](ids, counts, *sizes, BLOCK=block, BLOCK_E=experts + 1)
    assert counts[FAR, [0, 7], 1].tolist() == [block // 2, block // 2]
    counts[FAR, 7, 1] = 100
    capacity.position_kernel[(1,)](ids, counts, positions, *sizes, BLOCK=block, CHUNK=16)
    want = torch.arange(100, 100 + block // 2)
    assert torch.equal(positions[FAR, block : 2 * block : 2].long(), want)


def test_fp8_reads_and_writes_far_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Numbers of rows, in the order of memory, are quantised in blocks of 128."""
    per_program = 2
    run_only(monkeypatch, FAR * WIDTH // 128 // per_program)
    x = far_rows(WIDTH)
    numbers = sparse(*x.shape, dtype=torch.float8_e4m3fn)
    scales = sparse(len(x), WIDTH // 128, dtype=torch.float32)
    fp8.quantize_rows_kernel[(1,)](x, numbers, scales, scales.numel(), BLOCKS=per_program)
    want = fp8_ops.round_rows(x[FAR : FAR + 1])[0, :256]
    got = numbers[FAR, :256].float().view(2, 128) * scales[FAR, :2, None]
    assert torch.equal(got.flatten(), want.float())


def test_a_far_matrix_in_eight_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    expert = FAR * WIDTH // 128**2
    run_only(monkeypatch, expert)
    w = sparse(expert + 1, 128, 128)
    w[-1] = matrix(128, 128)
    numbers = sparse(*w.shape, dtype=torch.float8_e4m3fn)
    scales = sparse(expert + 1, dtype=torch.float32)
    fp8.quantize_weights_kernel[(1,)](w, numbers, scales, 128, 128, TRANSPOSED=False)
    assert torch.equal(numbers[-1].float() * scales[-1], fp8_ops.round_weights(w[-1:])[0].float())


def far_in_eight_bits(near: fp8.Quantized) -> fp8.Quantized:
    """Return rows of which those from FAR on are these."""
    far = (sparse(FAR + USED, part.shape[1], dtype=part.dtype) for part in near)
    rows = fp8.Quantized(*far)
    rows.numbers[FAR:], rows.scales[FAR:] = near
    return rows


def test_gemm_in_eight_bits_reads_and_writes_far_rows() -> None:
    for size_k, size_n in ((WIDTH, 128), (128, WIDTH)):
        near = fp8.quantize_rows(torch.randn(USED, size_k).to(DTYPE))
        w = fp8.quantize_weights(matrix(size_n, size_k))
        options = {"dtype": DTYPE, "config": CONFIG._replace(block_n=128)}
        far = far_in_eight_bits(near)
        got = fp8_gemm.grouped_gemm(far, w, COUNTS, **options, tiles=one_tile())
        want = fp8_gemm.grouped_gemm(near, w, COUNTS, **options)
        assert torch.equal(got[FAR:], want)


def test_up_in_eight_bits_reads_and_writes_far_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIG._replace(block_n=128)
    for dim, ffn_dim in ((WIDTH, 128), (128, WIDTH)):
        x, w, gates = torch.randn(USED, dim).to(DTYPE), matrix(ffn_dim, dim), torch.rand(USED)
        index = torch.tensor([3, 1, 0, 1, 2])
        want_z, want_a = fp8_up.up(x, index, gates, COUNTS, w, "gelu", config)
        far_index = sparse(FAR + USED, dtype=INT64)
        far_index[FAR:] = FAR + index
        far_gates = sparse(FAR + USED, dtype=torch.float32)
        far_gates[FAR:] = gates
        far = far_in_eight_bits(fp8.quantize_rows(x))
        with monkeypatch.context() as patch:
            # It would read all rows.
            patch.setattr(fp8_up, "quantize_rows", lambda _, far=far: far)
            inputs = (far_index, far_gates, COUNTS, w, "gelu", config, one_tile())
            z, a = fp8_up.up(x, *inputs)
        assert torch.equal(z[FAR:], want_z)
        for got, want in zip(a, want_a, strict=True):
            assert torch.equal(got[FAR:].float(), want.float())


@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_masks_of_far_tokens(monkeypatch: pytest.MonkeyPatch, activation: str) -> None:
    """Against the same tokens as the first ones, in the first block of neurons."""
    tile = mean_mask.TILE
    assert FAR % tile["BLOCK_T"] == 0
    hidden_dim = 2 * WIDTH if activation == "swiglu" else WIDTH
    near = [
        torch.randn(USED, hidden_dim).to(DTYPE),
        torch.randint(256, (USED, 1, WIDTH // 8), dtype=torch.uint8),
        torch.randn(USED, 1, WIDTH),
        torch.randn(USED, WIDTH).to(DTYPE),
    ]
    w, how = torch.randn(tile["BLOCK_F"], WIDTH), {"HARD": False, "PRECISION": "ieee", **tile}

    def run(hidden, bits, z, da) -> list[torch.Tensor]:
        sizes = (len(hidden), WIDTH, 1, WIDTH, 0.5)
        a, dhidden = sparse(*da.shape), sparse(*hidden.shape)
        dscores = sparse(*da.shape, dtype=torch.float32)
        first, tensors = (hidden, bits, z, w), (da, dhidden, dscores)
        mean_mask.forward_kernel[(1,)](*first, a, *sizes, ACTIVATION=activation, **how)
        mean_mask.backward_kernel[(1,)](*first, *tensors, *sizes, ACTIVATION=activation, **how)
        return [t[-USED:, : tile["BLOCK_F"]] for t in (a, dhidden, dscores)]

    want = run(*near)
    run_only(monkeypatch, FAR // tile["BLOCK_T"], axis=1)
    far = [sparse(FAR + USED, *t.shape[1:], dtype=t.dtype) for t in near]
    for tensor, values in zip(far, near, strict=True):
        tensor[FAR:] = values
    for got, expected in zip(run(*far), want, strict=True):
        assert expected.any()
        assert torch.equal(got, expected)
