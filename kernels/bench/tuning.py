"""Measure the tile shapes of each kernel of a problem, and keep the fastest on disk."""

import functools
from collections.abc import Callable

import torch
from dmoe_kernels.configs import Config, rows_bucket
from dmoe_kernels.configs import tune as tune_kernel
from dmoe_kernels.dz import dz
from dmoe_kernels.grouped_gemm import grouped_gemm, grouped_outer
from dmoe_kernels.slots import sort_slots
from dmoe_kernels.tiles import tile_rows
from dmoe_kernels.up import up
from measure import times_ms
from problem import Problem


def tune(problem: Problem) -> None:
    """Tune all products of the forward and the backward pass."""
    shape, x = problem.shape, problem.x_TD
    dim, ffn_dim, num_experts = shape.dim, shape.ffn_dim, shape.num_experts
    slots_R, index_R, *_, counts_E = sort_slots(problem.ids_TK, num_experts)
    num_rows = len(slots_R)
    bucket = rows_bucket(num_rows, num_experts)
    weights_R = problem.weights_TK.flatten()[slots_R]
    offsets = tile_rows(counts_E, num_rows, 128).offsets
    z_RH, a_RF = up(x, index_R, weights_R, counts_E, problem.w_up_EHD, "swiglu")
    gemm = functools.partial(grouped_gemm, counts_E=counts_E, num_rows=num_rows)
    outer = functools.partial(grouped_outer, index_R=index_R, offsets=offsets, dtype=x.dtype)
    runs: list[tuple[str, tuple[int, ...], Callable[[Config], object]]] = [
        (
            "up",
            (ffn_dim, dim),
            lambda c: up(x, index_R, weights_R, counts_E, problem.w_up_EHD, "swiglu", c),
        ),
        (
            "gemm",
            (dim, ffn_dim),
            lambda c: gemm(a_RF, problem.w_down_EDF, transposed=True, config=c),
        ),
        (
            "gemm",
            (dim, 2 * ffn_dim),
            lambda c: gemm(z_RH, problem.w_up_EHD, transposed=False, config=c),
        ),
        (
            "dz",
            (ffn_dim, dim),
            lambda c: dz(
                problem.dy_TD,
                index_R,
                z_RH,
                weights_R,
                counts_E,
                problem.w_down_EDF,
                "swiglu",
                c,
            ),
        ),
        (
            "outer",
            (dim, ffn_dim),
            lambda c: outer(problem.dy_TD, a_RF, gather_a=True, config=c),
        ),
        ("outer", (2 * ffn_dim, dim), lambda c: outer(z_RH, x, gather_a=False, config=c)),
    ]
    for kernel, sizes, run in runs:
        key = (*sizes, num_experts, bucket)
        name = f"{shape.name}, {kernel} {sizes}"
        measure = functools.partial(_milliseconds, name, run)
        best = tune_kernel(kernel, x.dtype, key, x.device, measure)
        print(f"{name}: {best}", flush=True)


def _milliseconds(name: str, run: Callable[[Config], object], config: Config) -> float:
    run(config)
    torch.cuda.synchronize()
    milliseconds = times_ms({"run": lambda: run(config)}, 10)["run"]
    print(f"{name}: {milliseconds:.3f} ms, {config}", flush=True)
    return milliseconds
