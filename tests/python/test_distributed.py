"""Several processes on the CPU, connected by gloo: see ``distributed_checks.py``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from distributed_checks import TIMEOUT, Stage, lose_a_peer, miss_a_block, run_all, spawn
from flash_attn_res.cli import main
from flash_attn_res.distributed import (
    PipelineLayout,
    Scaled,
    StageAttnRes,
    paper_volume,
    schedule,
)
from flash_attn_res.distributed.planning import Estimate
from stream_networks import DIM, Network, large_saved


@pytest.mark.parametrize("world", [2, 4])
def test_checks(world: int, tmp_path: Path) -> None:
    failures = run_all(world, "cpu", tmp_path)
    assert not failures, "\n\n".join(failures)


@pytest.mark.parametrize("kind", ["pipeline", "shards"])
def test_a_lost_peer_is_an_error(kind: str, tmp_path: Path) -> None:
    world = 2
    codes = spawn(lose_a_peer, world, "cpu", tmp_path, kind, grace=TIMEOUT)
    assert codes == [3] * (world - 1) + [9]
    for rank in range(world - 1):
        outcome = json.loads((tmp_path / f"{rank}.json").read_text())
        assert outcome["seconds"] <= TIMEOUT + 5


def test_a_missing_block_is_an_error_on_every_rank(tmp_path: Path) -> None:
    assert spawn(miss_a_block, 2, "cpu", tmp_path, grace=TIMEOUT) == [3, 3]
    for rank in range(2):
        error = json.loads((tmp_path / f"{rank}.json").read_text())["error"]
        assert error.startswith("rank 1, stage 3: forward of micro-batch 0: RuntimeError: resume:")
        assert "missing block: this rank should have kept the sources 0-" in error


def test_paper_volume() -> None:
    """Figure 3 of the paper: P = 4, V = 2; caching saves 6 of 28."""
    assert paper_volume(4, 2, 1, cache=False) == 28
    assert paper_volume(4, 2, 1, cache=True) == 22


def test_layout_of_blocks_that_span_stages() -> None:
    layout = PipelineLayout(10, 4, (0, 3, 6, 8, 10), (0, 1, 0, 1))
    assert [layout.has_partial(s) for s in range(4)] == [False, True, True, False]
    assert [list(layout.received(s)) for s in range(4)] == [[], [0], [1], [2]]
    naive = PipelineLayout(10, 4, (0, 3, 6, 8, 10), (0, 1, 0, 1), cache=False)
    assert [list(naive.received(s)) for s in range(4)] == [[], [0], [0, 1], [0, 1, 2]]


@pytest.mark.parametrize(
    ("bounds", "ranks", "message"),
    [
        ((0, 4, 9), (0, 1), r"bounds are \(0, 4, 9\), expected to go from 0 to 8"),
        ((0, 4, 4, 8), (0, 1, 0), "expected to increase"),
        ((0, 4, 8), (0,), "ranks has 1 items, expected 2"),
        ((0, 4, 8), (0, 2), "expected every rank from 0 to 2"),
        ((0, 4, 8), (0, 0), "stages 0 and 1 are both on rank 0"),
    ],
)
def test_layout_errors(bounds, ranks, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PipelineLayout(8, 4, bounds, ranks)


def test_a_stage_rounds_to_nearest() -> None:
    layout = PipelineLayout(8, 4, (0, 4, 8), (0, 1))
    with pytest.raises(ValueError, match="stochastic_rounding is given, expected None"):
        StageAttnRes(layout, 0, 16, stochastic_rounding=7)


def test_payload_errors() -> None:
    with pytest.raises(TypeError, match=r"dtype is torch.bfloat16, expected torch.float16 or"):
        Scaled(torch.bfloat16)
    with pytest.raises(ValueError, match=r"shape \[2, 5\], expected an even width"):
        Scaled(torch.float8_e4m3fn).encode(torch.randn(2, 5))


@pytest.mark.parametrize("sum_dtype", [None, torch.float32])
@pytest.mark.parametrize(
    ("layers", "block", "ranks"), [(12, 4, 3), (12, 3, 3), (8, 3, 4), (6, 1, 2), (7, 8, 2)]
)
def test_the_plan_of_memory_is_what_a_stage_keeps(layers, block, ranks, sum_dtype) -> None:
    """Bytes that autograd saves for a micro-batch whose sublayers are recomputed."""
    network = Network(layers, block, forms="two_phase", group_blocks=1, sum_dtype=sum_dtype)
    network.to(torch.bfloat16)
    plan = Estimate(
        *(layers, DIM, block, ranks),
        seq=64,
        micro_batches=1,
        sum_bytes=None if sum_dtype is None else 4,
    )
    layout = plan.layout()
    given: tuple[torch.Tensor, ...] = (torch.randn(1, 64, DIM).bfloat16().requires_grad_(),)
    for rank in range(ranks):
        stage = Stage(network, layout, rank, checkpoint=True)
        with large_saved(64 * DIM) as saved:
            sent = stage(*given)
        held = plan.memory(rank)
        own = plan.value if rank == 0 else 0  # what the test's stage multiplies its embedding with
        assert sum(saved.values()) == held.blocks + held.sums + own
        if rank + 1 < ranks:
            sizes = sum(tensor.nbytes for tensor in sent)
            assert sizes == plan.transitions()[rank]
            given = tuple(tensor.detach().requires_grad_() for tensor in sent)


def test_the_plan_of_a_step() -> None:
    """1F1B keeps as many micro-batches as stages follow, at most M; the bubble's known share."""
    for micro_batches in (2, 4, 8):
        plan = Estimate(16, 64, 2, pp=4, micro_batches=micro_batches)
        flying = [plan.memory(rank).in_flight for rank in range(4)]
        assert flying == [min(micro_batches, 4 - rank) for rank in range(4)]
    for P, V, M in ((4, 1, 8), (4, 1, 2), (4, 2, 8), (8, 3, 16), (2, 2, 2), (1, 1, 5)):
        assert schedule.bubble(P, V, M) == pytest.approx((P - 1) / (V * M + P - 1))
    interleaved = Estimate(16, 64, 2, pp=4, vpp=2, micro_batches=8)
    every = 9  # the embedding and the blocks: each is held once, over all stages of a rank
    for rank in range(4):
        held = interleaved.memory(rank)
        assert held.blocks <= held.in_flight * every * interleaved.value
        assert max(held.blocks, held.sums, held.buffers) <= held.together


def test_plan_prints_the_numbers_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    """Prefill: 8 blocks of 128K tokens are 15 GB, 1.9 GB a device in a group of 8, and less than

    0.3 GB in chunks of 16K tokens. Pipelines: the volumes of figure 3, and a transition's peak.
    """
    estimate = Estimate(layers=168, dim=7168, block_size=24, tp=8, seq=131072)
    assert 8 * estimate.value == pytest.approx(1.88e9, rel=0.01)
    assert 8 * estimate.value * 8 == pytest.approx(15.03e9, rel=0.01)
    cached = Estimate(layers=16, dim=64, block_size=2, pp=4, vpp=2, seq=10)
    embedding = 3  # travels once to every rank but the first
    assert sum(cached.transitions()) == (22 - 4 + embedding) * cached.value
    assert sum(cached.transitions(cache=False)) == (28 + 7) * cached.value
    chunk = Estimate(layers=168, dim=7168, block_size=24, tp=8, seq=16384)
    assert 8 * chunk.value == pytest.approx(0.235e9, rel=0.01)
    # P - 1 blocks and the sum, where naively there are C - 1 and the embedding.
    assert max(cached.transitions()[3:]) == 3 * cached.value
    assert max(cached.transitions(cache=False)) == 8 * cached.value
    assert main(["plan", "--tp", "8"]) == 0
    printed = capsys.readouterr().out
    assert "186 sublayers of width 7168 in 8 blocks of 24" in printed
    assert "0-1" in printed
    assert "reduce-scatter" in printed
    assert main(["plan", "--pp", "0"]) == 2
    assert "--pp is 0, expected at least 1" in capsys.readouterr().err
    assert main(["plan", "--pp", "100"]) == 2
    assert main(["plan", "--micro-batches", "0"]) == 2
    assert "--micro-batches is 0, expected at least 1" in capsys.readouterr().err
    assert main(["plan", "--links", "50", "nan"]) == 2
    assert "--links are [50.0, nan], expected numbers above 0" in capsys.readouterr().err
    assert main(["plan", "--value-bytes", "4", "--sum-bytes", "2"]) == 2
    assert "--sum-bytes is 2, expected at least the 4 of --value-bytes" in capsys.readouterr().err
    assert main(["plan", "--pp", "4", "--micro-batches", "9"]) == 2
    assert "--micro-batches: 9 micro-batches, expected a multiple of 2" in capsys.readouterr().err
    assert main(["plan", "--pp", "4", "--vpp", "1", "--micro-batches", "9"]) == 0
    assert "bubble: 25.0 % of a step" in capsys.readouterr().out
