"""What several processes check together; shared by the tests on CPU (gloo) and GPU (NCCL).

One set of processes runs all checks of a world size. A check is a function of a ``Process``; where
it must hold, every process asserts it. After a failure the processes are out of step: a fresh set
goes on with the next check.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime
import itertools
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.pipelining import (
    Schedule1F1B,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
    ScheduleInterleavedZeroBubble,
)

from flash_attn_res import BlockAttnRes
from flash_attn_res.distributed import (
    PipelineLayout,
    Plain,
    Scaled,
    StageAttnRes,
    Stored,
    TokenShards,
    make_stages,
    paper_volume,
    shared_errors,
)
from flash_attn_res.distributed.planning import Estimate
from stream_networks import DIM, Network, SwiGlu, assert_equal, assert_gradients

TIMEOUT = 60
"""Seconds that a collective waits for a peer."""

GRACE = 10
"""Seconds for the other processes to tell of an error of their own, after one has failed."""

LIMIT = {"cpu": 600, "cuda": 240}
"""Seconds for all checks of a world size."""


@dataclasses.dataclass
class Process:
    rank: int
    world: int
    device: torch.device

    @property
    def last(self) -> bool:
        return self.rank == self.world - 1

    @property
    def close(self) -> dict[str, float]:
        """For assert_close of float32 sums of one: a GPU's order depends on a matrix's shape."""
        return {"rtol": 1e-4, "atol": 1e-4} if self.device.type == "cuda" else {}


CHECKS: list[Callable[[Process], None]] = []


def check(function: Callable[[Process], None]) -> Callable[[Process], None]:
    CHECKS.append(function)
    return function


# ---------------------------------------------------------------------------------- pipeline


class Stage(nn.Module):
    """The sublayers of one stage of a network, on its own parameters."""

    def __init__(
        self, network: Network, layout: PipelineLayout, stage: int, checkpoint: bool = False, **more
    ) -> None:
        super().__init__()
        whole = network.attn_res
        weight = whole.queries
        self.attn_res = StageAttnRes(
            layout, stage, whole.dim, forms=whole.forms, group_blocks=whole.group_blocks,
            grad_dtype=whole.grad_dtype, block_storage=whole.block_storage,
            sum_dtype=whole.sum_dtype, device=weight.device, dtype=weight.dtype, **more,
        )  # fmt: skip
        sites, sublayers = layout.sites(stage), layout.sublayers(stage)
        with torch.no_grad():
            self.attn_res.queries.copy_(whole.queries[sites.start : sites.stop])
            self.attn_res.key_weight.copy_(whole.key_weight[sites.start : sites.stop])
        # Copies: wrappers change a module's parameters, and the network stays what it is.
        self.layers = nn.ModuleList(copy.deepcopy(network.layers[i]) for i in sublayers)
        self.norms = nn.ParameterList(network.norms[i].detach().clone() for i in sites)
        self.layout, self.stage, self.checkpoint = layout, stage, checkpoint
        # An embedding, so that the first source has a gradient to hand out.
        self.embed = nn.Parameter(torch.ones(whole.dim).to(weight)) if stage == 0 else None

    def forward(self, *given: Tensor):
        if self.stage == 0:
            stream = self.attn_res.start(given[0] * self.embed)
        else:
            stream = self.attn_res.resume(*given)
        for layer, norm in zip(self.layers, self.norms, strict=False):
            stream.sublayer(layer, norm, checkpoint=self.checkpoint)
        if self.stage == self.layout.num_stages - 1:
            return stream.finish(self.norms[-1])
        return self.attn_res.export(stream)


def square_loss(y: Tensor, target: Tensor) -> Tensor:
    return (y * target).sum()


def make_network(
    process: Process, layers: int, block: int, dtype: torch.dtype, **options
) -> Network:
    torch.manual_seed(11)
    return Network(layers, block, **options).to(process.device, dtype)


def run_pipeline(
    process: Process,
    layers: int,
    block: int,
    *,
    virtual: int = 1,
    dtype: torch.dtype = torch.float32,
    micro_batches: int = 4,
    layout: PipelineLayout | None = None,
    schedule: type | None = None,
    steps: int = 1,
    payload=None,
    checkpoint: bool = False,
    shape: tuple[int, int] = (2, 5),
    cache: bool = True,
    wrap: Callable[[nn.Module], nn.Module] = lambda module: module,
    group: dist.ProcessGroup | None = None,
    **options,
):
    """Gradients of this rank's stages and of the network in one process, by name; the stages."""
    network = make_network(process, layers, block, dtype, **options)
    if layout is None:
        layout = PipelineLayout.even(layers, block, process.world, virtual, cache=cache)
    x = torch.randn(micro_batches * shape[0], shape[1], DIM).to(process.device, dtype)
    target = torch.randn_like(x)
    own = {
        stage: Stage(network, layout, stage, checkpoint) for stage in layout.stages_of(process.rank)
    }
    modules = {stage: wrap(module) for stage, module in own.items()}
    stages = make_stages(
        modules, (*shape, DIM), dtype, device=process.device, payload=payload, group=group
    )
    kind = schedule or (Schedule1F1B if len(stages) == 1 else ScheduleInterleaved1F1B)
    given = stages[0] if kind in (Schedule1F1B, ScheduleGPipe) else stages
    runner = kind(given, micro_batches, loss_fn=square_loss, scale_grads=False)
    for _ in range(steps):
        network.zero_grad()
        for module in own.values():
            module.zero_grad()
        inputs = (x,) if 0 in own else ()
        last = layout.num_stages - 1 in own
        runner.step(*inputs, target=target if last else None, losses=[] if last else None)
    ours: dict[str, Tensor] = {}
    for stage, module in own.items():
        ours[f"{stage} queries"] = module.attn_res.queries.grad
        ours[f"{stage} key weights"] = module.attn_res.key_weight.grad
        if stage == 0:
            ours["embedding"] = module.embed.grad
        for name, parameter in module.named_parameters():
            if name.startswith(("layers", "norms")):
                ours[f"{stage} {name}"] = parameter.grad
    ours = {name: gradient.clone() for name, gradient in ours.items()}
    network.zero_grad()
    return ours, (network, layout, own, x, target), stages


def one_process(given, micro_batches: int, dtype: torch.dtype, eager: bool = False):
    """The same gradients, of the network run as a whole, a micro-batch at a time."""
    network, layout, own, x, target = given
    held = network.norms[0].dtype
    network.to(dtype)
    embed = torch.ones(DIM, device=x.device, dtype=dtype, requires_grad=True)
    for batch, goal in zip(
        x.to(dtype).chunk(micro_batches), target.to(dtype).chunk(micro_batches), strict=True
    ):
        y = network.eager(batch * embed) if eager else network(batch * embed)
        square_loss(y, goal).backward()
    found = {}
    for stage in own:
        sites, sublayers = layout.sites(stage), layout.sublayers(stage)
        rows = slice(sites.start, sites.stop)
        found[f"{stage} queries"] = network.attn_res.queries.grad[rows]
        found[f"{stage} key weights"] = network.attn_res.key_weight.grad[rows]
        if stage == 0:
            found["embedding"] = embed.grad
        for local, index in enumerate(sublayers):
            for name, parameter in network.layers[index].named_parameters():
                found[f"{stage} layers.{local}.{name}"] = parameter.grad
        for local, index in enumerate(sites):
            found[f"{stage} norms.{local}"] = network.norms[index].grad
    found = {name: gradient.clone() for name, gradient in found.items()}
    network.zero_grad()
    network.to(held)
    return found


def assert_pipeline(result, micro_batches: int = 4) -> None:
    """A pipeline may err as much as one process does, by the formulas or by this library.

    How those two compare is what the tests of the stream ask.
    """
    ours, given, _ = result
    dtype = given[0].norms[0].dtype
    exact = one_process(given, micro_batches, torch.float64, eager=True)
    if dtype == torch.float64:
        assert_gradients(ours, exact)
        return
    alone = [one_process(given, micro_batches, dtype, eager=eager) for eager in (True, False)]
    assert_gradients(ours, exact, worse(exact, *alone))


def worse(exact: dict[str, Tensor], *found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of several results, by name the one with the larger error."""

    def error(name: str, index: int) -> float:
        return (found[index][name].double() - exact[name]).norm().item()

    each = range(len(found))
    return {name: found[max(each, key=lambda i, n=name: error(n, i))][name] for name in exact}


@check
def pipeline_is_bit_for_bit_where_blocks_end_with_stages(process: Process) -> None:
    for schedule in (Schedule1F1B, ScheduleGPipe):
        result = run_pipeline(
            process, 4 * process.world, 4, forms="two_phase", group_blocks=1, schedule=schedule
        )
        assert_equal(result[0], one_process(result[1], 4, torch.float32))


@check
def pipeline_with_stored_blocks_is_bit_for_bit_where_blocks_end_with_stages(
    process: Process,
) -> None:
    """What a stage sends are the values of its stored blocks: storing them again changes none."""
    for storage in ("float16", "float8"):
        result = run_pipeline(
            process, 4 * process.world, 4, forms="two_phase", group_blocks=1, block_storage=storage
        )
        assert_equal(result[0], one_process(result[1], 4, torch.float32))


@check
def pipeline_equals_float64(process: Process) -> None:
    """Blocks across stages, several in a stage, Full AttnRes; stages of unequal size."""
    if process.device.type == "cuda":
        return  # float64 is computed on the CPU alone
    for layers, block, virtual in ((8, 3, 1), (8, 1, 2), (9, 5, 2), (8, 2, 2), (8, 8, 1)):
        for forms in ("auto", "one_shot"):
            result = run_pipeline(
                process, layers, block, virtual=virtual, dtype=torch.float64, forms=forms
            )
            assert_pipeline(result)


@check
def pipeline_in_every_dtype(process: Process) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for checkpoint in (False, True):
            result = run_pipeline(
                process, 8, 3, virtual=2, dtype=dtype, checkpoint=checkpoint, steps=2
            )
            assert_pipeline(result)


@check
def pipeline_checkpointing_changes_no_bit(process: Process) -> None:
    plain = run_pipeline(process, 8, 3, virtual=2)
    again = run_pipeline(process, 8, 3, virtual=2, checkpoint=True)
    assert_equal(again[0], plain[0])


@check
def pipeline_frees_and_counts(process: Process) -> None:
    """Volume by the formulas; nothing is kept after a step."""
    P, M = process.world, 2 * process.world
    for virtual in (1, 2):
        for cache in (True, False):
            per_stage = 1  # blocks
            result = run_pipeline(
                process, P * virtual * 2, 2, virtual=virtual, cache=cache, micro_batches=M, steps=2
            )
            assert_pipeline(result, M)
            _, (_, layout, *_), stages = result
            sent = torch.zeros(2, dtype=torch.int64)
            for stage in stages:
                assert len(stage.cache) == 0
                every = [*stage.args_recv_info.values(), *stage.grad_recv_info.values()]
                buffers = [getattr(info, "buffer", None) for infos in every for info in infos]
                assert all(buffer is None or buffer.is_meta for buffer in buffers)
                # A PipelineStage alone has those of all M micro-batches.
                received = layout.values_received(stage.stage_index)
                if not stage.is_last:
                    received += layout.values_received(stage.stage_index + 1)
                assert stage.peak_buffers <= received * (1 if virtual == 1 else P)
                sent += torch.tensor([stage.sent_bytes["forward"], stage.sent_bytes["backward"]])
            sent = sent.to(process.device)
            dist.all_reduce(sent)
            value = 2 * 5 * DIM * 4 * M * 2  # bytes of a [T, D] value, micro-batches, steps
            volume = paper_volume(P, virtual, per_stage, cache=cache)
            if cache:  # what a rank completed itself does not come back to it
                volume -= (virtual - 1) * P * per_stage
            # The embedding travels once to every rank but the first, or with every transition.
            volume += P - 1 if cache else P * virtual - 1
            assert sent.tolist() == [volume * value] * 2
            assert layout.blocks_sent() == volume
            plan = Estimate(
                *(layout.num_sublayers, DIM, layout.block_size, P, virtual),
                seq=2 * 5,
                micro_batches=M,
                value_bytes=4,
            )
            own = sum(sum(stage.sent_bytes.values()) for stage in stages)
            if cache:
                assert own == 2 * plan.sent(process.rank)  # steps
                assert stages[0].cache.peak_values == most_kept(plan, process.rank)


def most_kept(plan: Estimate, rank: int) -> int:
    """Values that a rank's cache holds at a time: of micro-batches that it still runs forward."""
    layout = plan.layout()
    own = layout.stages_of(rank)
    kept: dict[int, int] = {}
    most = 0
    for backward, stage, micro_batch in plan.actions(rank):
        if backward:
            continue
        kept.setdefault(micro_batch, 0)
        if stage + 1 < layout.num_stages:  # the last stage keeps no more
            kept[micro_batch] = layout.completed(stage + 1)
        most = max(most, sum(kept.values()))
        if stage == own[-1]:
            del kept[micro_batch]
    return most


@check
def pipeline_on_a_subgroup(process: Process) -> None:
    """A group whose ranks are not those of the default group; at world 4, two pipelines."""
    half = process.world // 2
    groups = [list(range(process.world))] if half == 1 else [[0, 2], [1, 3]]
    made = [dist.new_group(ranks, timeout=wait_for(process.device.type)) for ranks in groups]
    for ranks, group in zip(groups, made, strict=True):
        if process.rank in ranks:
            part_of = Process(ranks.index(process.rank), len(ranks), process.device)
            assert_pipeline(run_pipeline(part_of, 8, 3, virtual=2, group=group))


@check
def pipeline_payloads(process: Process) -> None:
    """Formats of fewer bytes: errors of their own size, and fewer bytes."""
    plain = run_pipeline(process, 8, 3, virtual=2, dtype=torch.float32)
    exact = one_process(plain[1], 4, torch.float64, eager=True)
    sent = {}
    for payload, tolerance in (
        (Plain(), 1e-4),
        (Scaled(torch.float16), 5e-3),
        (Scaled(torch.float8_e4m3fn), 0.35),
        (Stored("float16"), 5e-3),
        (Stored("float8"), 0.35),
    ):
        ours, _, stages = run_pipeline(process, 8, 3, virtual=2, payload=payload)
        sent[payload.name] = sum(stage.sent_bytes["forward"] for stage in stages)
        for name, gradient in ours.items():
            error = (gradient.double() - exact[name]).norm() / exact[name].norm().clamp_min(1e-3)
            assert error <= tolerance, f"{payload.name}: {name}: {error}"
    if not process.last:
        assert sent["scaled float8_e4m3fn"] < 0.6 * sent["scaled float16"] < 0.4 * sent["plain"]


@check
def pipeline_sends_blocks_as_they_are_stored(process: Process) -> None:
    """A forward has the bits of one process that stores; the bytes are those that are stored."""
    P, M = process.world, 4 if process.world == 4 else 2
    for mode, dtype, block in itertools.product(
        ("float16", "float8"), (torch.float32, torch.bfloat16), (2, 3)
    ):
        # A group of several blocks that stages cut in two reads in another form.
        network = make_network(process, 4 * P, block, dtype, block_storage=mode, group_blocks=1)
        layout = PipelineLayout.even(4 * P, block, P, 2)
        own = {s: Stage(network, layout, s) for s in layout.stages_of(process.rank)}
        x = torch.randn(2 * M, 5, DIM).to(process.device, dtype)
        stages = make_stages(own, (2, 5, DIM), dtype, device=process.device, payload=Stored(mode))
        runner = ScheduleInterleaved1F1B(stages, M)
        with torch.no_grad():
            y = runner.step(*((x,) if 0 in own else ()))
            if process.last:
                expected = torch.cat([network(batch) for batch in x.chunk(M)])
                # A GPU's phase 1 may add up in another order for the sites of a part of a block.
                if block == 2 or process.device.type == "cpu":
                    assert torch.equal(y, expected)
                else:
                    eps = torch.finfo(dtype).eps
                    torch.testing.assert_close(y, expected, rtol=64 * eps, atol=64 * eps)
        for stage in stages:
            if stage.is_last:
                continue
            received = layout.received(stage.stage_index + 1)
            plain = (0 in received) + layout.has_partial(stage.stage_index + 1)
            stored = len(received) - (0 in received)
            token = {"float16": 2 * DIM + 2, "float8": DIM + 2}[mode]
            bytes_a_token = plain * DIM * dtype.itemsize + stored * token
            assert stage.sent_bytes["forward"] == M * 10 * bytes_a_token


@check
def pipeline_with_float32_sums(process: Process) -> None:
    """The running sum travels in float32, where a stage ends in the middle of a block."""
    P = process.world
    for virtual, block, storage in ((1, 3, None), (2, 3, None), (2, 8, None), (2, 3, "float16")):
        result = run_pipeline(
            *(process, 4 * P, block),
            virtual=virtual,
            dtype=torch.bfloat16,
            sum_dtype=torch.float32,
            block_storage=storage,
            payload=None if storage is None else Stored(storage),
        )
        _, (_, layout, *_), stages = result
        if storage is None:
            assert_pipeline(result)
        for stage in stages:
            if stage.is_last:
                continue
            received = layout.received(stage.stage_index + 1)
            stored = 0 if storage is None else len(received) - (0 in received)
            token = 2 * DIM * (len(received) - stored) + (2 * DIM + 2) * stored
            token += 4 * DIM * layout.has_partial(stage.stage_index + 1)
            assert stage.sent_bytes["forward"] == 4 * 10 * token


@check
def pipeline_without_gradients(process: Process) -> None:
    network = make_network(process, 8, 3, torch.float32)
    layout = PipelineLayout.even(8, 3, process.world, 2)
    own = {s: Stage(network, layout, s) for s in layout.stages_of(process.rank)}
    x = torch.randn(4, 5, DIM).to(process.device)
    stages = make_stages(own, (2, 5, DIM), torch.float32, device=process.device)
    runner = ScheduleInterleaved1F1B(stages, 2 if process.world == 2 else 4)
    with torch.no_grad():
        x = torch.cat([x, x]) if process.world == 4 else x
        y = runner.step(*((x,) if 0 in own else ()))
        if layout.num_stages - 1 in own:
            torch.testing.assert_close(y, network(x), **process.close)
    assert len(stages[0].cache) == 0


@check
def pipeline_with_split_backwards(process: Process) -> None:
    """Zero bubble: the backward runs as a whole in the place of its first half."""
    result = run_pipeline(process, 8, 3, virtual=2, schedule=ScheduleInterleavedZeroBubble)
    assert_pipeline(result)


@check
def pipeline_errors_are_seen_by_every_rank(process: Process) -> None:
    world, last = process.world, process.last
    network = make_network(process, 8, 4, torch.float32)

    def given(layout: PipelineLayout, other: PipelineLayout | None = None, net=None):
        chosen = other if last and other is not None else layout
        return {
            s: Stage(net if last and net is not None else network, chosen, s)
            for s in chosen.stages_of(process.rank)
        }

    def stages(modules, dim: int = DIM, dtype=torch.float32, payload=None):
        return make_stages(modules, (2, 5, dim), dtype, device=process.device, payload=payload)

    even = PipelineLayout.even(8, 4, world)
    where = f"rank {world - 1}, stage {world - 1}"
    with pytest.raises(ValueError, match=f"{where}: block_size is 2, expected 4 .*rank 0, stage 0"):
        stages(given(even, PipelineLayout.even(8, 2, world)))
    narrow = Network(8, 4, dim=16).to(process.device)
    with pytest.raises(ValueError, match=f"{where}: dim is 16, expected {DIM}"):
        stages(given(even, net=narrow), dim=16 if last else DIM)
    with pytest.raises(ValueError, match=r"rank 0, stage 0: shape is \[2, 5, 99\]"):
        stages(given(even), dim=DIM if last else 99)
    with pytest.raises(TypeError, match=f"{where}: dtype is torch.bfloat16, expected .*float32"):
        stages(given(even), dtype=torch.bfloat16 if last else torch.float32)
    for name, options, value in (
        ("eps", {"eps": 1e-5}, "1e-05, expected 1e-06"),
        ("scale", {"scale": 2.0}, "2.0, expected 1.0"),
        ("key_weight", {"key_weight": False}, "False, expected True"),
        ("query_dim", {"query_dim": 16}, f"16, expected {DIM}"),
        ("block_storage", {"block_storage": "float8"}, "float8, expected None"),
        ("grad_dtype", {"grad_dtype": None}, "None, expected torch.float32"),
        ("sum_dtype", {"sum_dtype": torch.float32}, "torch.float32, expected None"),
    ):
        part_of = StageAttnRes(even, process.rank, DIM, **(options if last else {}))
        with pytest.raises((TypeError, ValueError), match=f"{where}: {name} is {value} as of rank"):
            stages({process.rank: part_of})
    # What nobody foresaw is still an error on every rank.
    with pytest.raises(
        RuntimeError, match=f"make_stages: rank {world - 1}: AttributeError: .*name"
    ):
        stages(given(even), payload=object() if last else None)
    with pytest.raises(TypeError, match=f"{where}: payload is scaled float16, expected plain"):
        stages(given(even), payload=Scaled(torch.float16) if last else None)
    wrong = PipelineLayout.even(8, 4, world + 1)
    with pytest.raises(ValueError, match=f"rank 0, stage 0: the group has {world} ranks, expected"):
        stages({process.rank: Stage(network, wrong, process.rank)})
    modules = given(PipelineLayout.even(8, 4, world, 2))
    if last:
        del modules[2 * world - 1]
    with pytest.raises(ValueError, match=f"rank {world - 1}, stage {2 * world - 1}: no module"):
        stages(modules)
    with pytest.raises(ValueError, match=f"rank {world - 1}: modules is empty"):
        stages({} if last else given(even))

    # A stage by itself.
    interleaved = PipelineLayout.even(8, 4, world, 2)
    alone = StageAttnRes(interleaved, 2 * world - 1, DIM).to(process.device)
    value = torch.randn(2, 5, DIM, device=process.device)
    with pytest.raises(RuntimeError, match=f"stage {2 * world - 1}: missing block: this rank sho"):
        alone.resume(value, value)
    second = StageAttnRes(interleaved, 1, DIM).to(process.device)
    with pytest.raises(ValueError, match="rank 1, stage 1: missing block: 1 tensors were given"):
        second.resume(value)
    if interleaved.values_received(1) > 1:
        with pytest.raises(TypeError, match=r"rank 1, stage 1: the running sum is torch\.bfloat16"):
            second.resume(value, value.bfloat16())


# ---------------------------------------------------------------------------------- sequence


class ColumnRow(nn.Module):
    """This rank's part of a SwiGLU: columns of up, rows of down; the output is a partial sum."""

    def __init__(self, layer: SwiGlu, rank: int, world: int) -> None:
        super().__init__()
        a, b = layer.up.weight.chunk(2)
        rows = slice(rank * a.shape[0] // world, (rank + 1) * a.shape[0] // world)
        self.a, self.b = nn.Parameter(a[rows].clone()), nn.Parameter(b[rows].clone())
        self.down = nn.Parameter(layer.down.weight[:, rows].clone())
        self.rows = rows

    def forward(self, x: Tensor) -> Tensor:
        return (nn.functional.silu(x @ self.a.t()) * (x @ self.b.t())) @ self.down.t()

    def compare(self, layer: SwiGlu) -> dict[str, tuple[Tensor, Tensor]]:
        a, b = layer.up.weight.grad.chunk(2)
        return {
            "a": (self.a.grad, a[self.rows]),
            "b": (self.b.grad, b[self.rows]),
            "down": (self.down.grad, layer.down.weight.grad[:, self.rows]),
        }


def mlp_network(process: Process, dtype: torch.dtype, layers: int = 7, block: int = 3) -> Network:
    network = make_network(process, layers, block, dtype)
    torch.manual_seed(7)
    network.layers = nn.ModuleList(SwiGlu(DIM) for _ in range(layers)).to(process.device, dtype)
    for layer in network.layers:
        nn.init.zeros_(layer.down.bias)
    return network


@check
def sequence_shards(process: Process) -> None:
    """Outputs and every gradient, for tokens that the group divides and that it does not."""
    group = dist.new_group(list(range(process.world)), timeout=wait_for(process.device.type))
    mesh = dist.device_mesh.init_device_mesh(process.device.type, (process.world,))
    cuda = process.device.type == "cuda"
    dtype = torch.float32 if cuda else torch.float64
    tight = {"rtol": 2e-4, "atol": 2e-4} if cuda else {"rtol": 1e-8, "atol": 1e-9}
    for dim, tokens, given, checkpoint in (
        (0, 8, group, False),
        (0, 7, mesh, True),
        (1, 8, mesh, False),
        (1, 5, None, True),
    ):
        network = mlp_network(process, dtype)
        parts = [ColumnRow(layer, process.rank, process.world) for layer in network.layers]
        shape = (tokens, 3) if dim == 0 else (3, tokens)
        x = torch.randn(*shape, DIM).to(process.device, dtype).requires_grad_()
        cotangent = torch.randn_like(x)
        y = network(x)
        (y * cotangent).sum().backward()
        expected = {name: p.grad.clone() for name, p in network.named_parameters()}
        dx = x.grad.clone()
        x.grad = None
        shared = [network.attn_res.queries, network.attn_res.key_weight, *network.norms]
        for parameter in shared:
            parameter.grad = None

        shards = TokenShards(given, dim=dim)
        stream = shards.start(network.attn_res, x)
        own = shards.shard_size(tokens)
        for part_of, norm in zip(parts, network.norms, strict=False):
            stream.sublayer(part_of, norm, checkpoint=checkpoint)
            if not checkpoint:
                assert stream.stream._partial is None or stream.stream._partial.shape[dim] == own
        local = stream.finish(network.norms[-1], gather=False)
        assert local.shape[dim] == own
        torch.testing.assert_close(shards.gather(local, tokens), y, **tight)
        (local * shards.own(cotangent)).sum().backward()
        shards.sync_gradients(shared)
        torch.testing.assert_close(x.grad, dx, **tight)
        for name, parameter in network.named_parameters():
            if parameter in set(shared):
                torch.testing.assert_close(parameter.grad, expected[name], **tight)
        for part_of, layer in zip(parts, network.layers, strict=True):
            for ours, exact in part_of.compare(layer).values():
                torch.testing.assert_close(ours, exact, **tight)


class Parts(nn.Module):
    """All ranks' parts of a layer in one process, summed as a reduce-scatter does."""

    def __init__(self, layer: SwiGlu, world: int) -> None:
        super().__init__()
        self.parts = nn.ModuleList(ColumnRow(layer, rank, world) for rank in range(world))

    def forward(self, x: Tensor) -> Tensor:
        first, *rest = (part_of(x) for part_of in self.parts)
        return sum(rest, first)


class Ahead(TokenShards):
    """Runs phase 1 of a block ahead on the stream that everything runs on, CPUs included."""

    def overlaps(self, device: torch.device) -> bool:
        return True

    def side_stream(self, device: torch.device) -> torch.cuda.Stream | None:
        return torch.cuda.current_stream(device) if device.type == "cuda" else None


@check
def sequence_shards_with_phase_1_ahead(process: Process) -> None:
    """Against one process by the formulas; and on a side stream, the same bits every time."""
    for dtype in (torch.float32, torch.bfloat16):
        phase_1_ahead(process, dtype)
    phase_1_ahead(process, torch.bfloat16, sum_dtype=torch.float32)


def phase_1_ahead(process: Process, dtype: torch.dtype, **options) -> None:
    cuda = process.device.type == "cuda"
    dim, tokens = (1024, 2049) if cuda else (DIM, 9)
    torch.manual_seed(5)
    network = Network(12, 4, dim=dim, **options)
    network.layers = nn.ModuleList(Parts(SwiGlu(dim), process.world) for _ in range(12))
    network.to(process.device, dtype)
    x = torch.randn(tokens, 2, dim).to(process.device, dtype)
    cotangent = torch.randn(tokens, 2, dim).to(process.device, dtype)
    shared = [network.attn_res.queries, network.attn_res.key_weight, *network.norms]
    names = {id(parameter): name for name, parameter in network.named_parameters()}
    own = [layer.parts[process.rank] for layer in network.layers]
    tensors = [*shared, *(parameter for part_of in own for parameter in part_of.parameters())]

    def run(shards: TokenShards) -> dict[str, Tensor]:
        network.zero_grad()
        given = x.detach().requires_grad_()
        stream = shards.start(network.attn_res, given)
        assert any(group.two_phase for group in stream.stream._plan.groups)
        for part_of, norm in zip(own, network.norms, strict=False):
            stream.write(part_of(stream.read(norm)))
        y = stream.finish(network.norms[-1], gather=False)
        y.backward(shards.own(cotangent))
        shards.sync_gradients(shared)
        found = {names[id(tensor)]: tensor.grad for tensor in tensors}
        return {**found, "x": given.grad, "y": shards.gather(y.detach(), tokens)}

    def one_process_s(kind: torch.dtype, eager: bool) -> dict[str, Tensor]:
        alone = copy.deepcopy(network).to(kind)
        alone.zero_grad()
        given = x.to(kind).detach().requires_grad_()
        y = alone.eager(given) if eager else alone(given)
        y.backward(cotangent.to(kind))
        every = {name: parameter.grad for name, parameter in alone.named_parameters()}
        every |= {"x": given.grad, "y": y.detach()}
        return {name: every[name] for name in ahead}

    ahead = run(Ahead())
    exact = one_process_s(torch.float64, eager=True)
    # In bfloat16 the collectives round in another order than one process: they may err as much
    # as they do where nothing runs ahead.
    others = [one_process_s(dtype, eager) for eager in (True, False)]
    assert_gradients(ahead, exact, worse(exact, *others, run(TokenShards(overlap=False))))
    del exact, others
    for repeat in range(20 if cuda else 1):
        # Memory that is given out anew before its last reader was done holds NaN.
        for size in (tokens * dim // process.world, 2 * tokens * dim, 2**20 + repeat * 2**16):
            held = [torch.full((size,), torch.nan).to(x) for _ in range(1 + repeat % 5)]
            del held
        assert_equal(run(TokenShards() if cuda else Ahead()), ahead)


@check
def sequence_shards_with_a_gathered_output(process: Process) -> None:
    """A head that each rank computes a part of: the gradients of all ranks' copies are summed."""
    network = mlp_network(process, torch.float32)
    parts = [ColumnRow(layer, process.rank, process.world) for layer in network.layers]
    x = torch.randn(8, 2, DIM).to(process.device).requires_grad_()
    head = torch.randn(DIM, 4 * process.world).to(process.device)
    (network(x) @ head).square().sum().backward()
    dx, x.grad = x.grad.clone(), None
    shards = TokenShards()
    stream = shards.start(network.attn_res, x)
    for part_of, norm in zip(parts, network.norms, strict=False):
        stream.write(part_of(stream.read(norm)))
    y = stream.finish(network.norms[-1])
    (y @ head[:, 4 * process.rank : 4 * process.rank + 4]).square().sum().backward()
    torch.testing.assert_close(x.grad, dx, rtol=2e-3, atol=2e-3)


@check
def sequence_shards_overlap_changes_the_form_alone(process: Process) -> None:
    """The plan with first sites that read directly computes the same; its phase 1 runs ahead."""
    from flash_attn_res.distributed.sequence import split_first

    network = mlp_network(process, torch.float32, 12, 4)
    x = torch.randn(8, 2, DIM).to(process.device)
    y = network(x)
    stream = network.attn_res.start(x)
    stream.use_plan(split_first)
    for norm, layer in zip(network.norms, network.layers, strict=False):
        h = stream.read(norm)
        stream.prefetch()
        stream.write(layer(h))
    torch.testing.assert_close(stream.finish(network.norms[-1]), y, **process.close)


@check
def sequence_dtensor_layers(process: Process) -> None:
    """Layers of parallelize_module that take the tokens' shards and give DTensors."""
    from torch.distributed.tensor import Partial, Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        parallelize_module,
    )

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(DIM, 2 * DIM, bias=False)
            self.down = nn.Linear(2 * DIM, DIM, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(nn.functional.silu(self.up(x)))

    mesh = dist.device_mesh.init_device_mesh(process.device.type, (process.world,))
    network = mlp_network(process, torch.float32, 5, 2)
    torch.manual_seed(3)
    network.layers = nn.ModuleList(Mlp() for _ in range(5)).to(process.device)
    x = torch.randn(8, 2, DIM).to(process.device).requires_grad_()
    y = network(x)
    y.square().sum().backward()
    expected = {name: p.grad.clone() for name, p in network.named_parameters()}
    dx, x.grad = x.grad.clone(), None
    network.zero_grad()
    for layer in network.layers:
        parallelize_module(
            layer,
            mesh,
            {
                "": PrepareModuleInput(input_layouts=Shard(0), desired_input_layouts=Replicate()),
                "up": ColwiseParallel(),
                "down": RowwiseParallel(output_layouts=Partial(), use_local_output=False),
            },
        )
    shards = TokenShards(mesh)
    stream = shards.start(network.attn_res, x)
    for norm, layer in zip(network.norms, network.layers, strict=False):
        stream.write(layer(stream.read(norm, dtensor=True)))
    local = stream.finish(network.norms[-1], gather=False)
    local.square().sum().backward()
    shards.sync_gradients([network.attn_res.queries, network.attn_res.key_weight, *network.norms])
    tight = {"rtol": 1e-3, "atol": 1e-3}
    torch.testing.assert_close(x.grad, dx, **tight)
    for name, parameter in network.named_parameters():
        gradient = parameter.grad
        if hasattr(gradient, "full_tensor"):
            gradient = gradient.full_tensor()
        torch.testing.assert_close(gradient, expected[name], **tight)


@check
def chunked_prefill(process: Process) -> None:
    network = mlp_network(process, torch.float32)
    parts = [ColumnRow(layer, process.rank, process.world) for layer in network.layers]
    x = torch.randn(21, 2, DIM).to(process.device)
    shards = TokenShards()
    with torch.no_grad():
        done = []
        for span in shards.chunks(21, 8):
            stream = shards.start(network.attn_res, x[span])
            for part_of, norm in zip(parts, network.norms, strict=False):
                stream.write(part_of(stream.read(norm)))
            done.append(stream.finish(network.norms[-1]))
        torch.testing.assert_close(torch.cat(done), network(x), rtol=1e-4, atol=1e-4)


@check
def sequence_shards_that_differ_are_an_error_on_every_rank(process: Process) -> None:
    last, final = process.last, process.world - 1
    x = torch.randn(10, 2, DIM).to(process.device)

    def start(given: Tensor, block: int = 2, dim: int = 0) -> None:
        attn_res = BlockAttnRes(4, given.shape[-1], block, device=process.device)
        TokenShards(dim=dim).start(attn_res, given)

    with pytest.raises(
        ValueError, match=rf"rank {final}: .*shape is \[7, 2, 32\], expected \[10, 2"
    ):
        start(x[:7] if last else x)
    with pytest.raises(
        ValueError, match=rf"rank {final}: .*dtype is torch.bfloat16, expected torch.f"
    ):
        start(x.bfloat16() if last else x)
    with pytest.raises(
        ValueError, match=rf"rank {final}: block_size is 4, expected 2 as of rank 0"
    ):
        start(x, 4 if last else 2)
    with pytest.raises(
        ValueError, match=rf"rank {final}: the dimension of tokens is 1, expected 0"
    ):
        start(x, dim=1 if last else 0)
    # A shape that is new to one rank alone.
    start(x)
    start(x[:4])
    if not last:
        start(x)
    dist.barrier()
    if last:
        with pytest.raises(ValueError, match=rf"rank {final}: .*shape is \[6, 2, 32\], expected"):
            start(x[:6])


@check
def sequence_errors(process: Process) -> None:
    shards = TokenShards(dim=1)
    network = mlp_network(process, torch.float32, 2, 2)
    x = torch.randn(2, 8, DIM).to(process.device)
    with pytest.raises(ValueError, match=rf"rank {process.rank}: the value has shape \[{DIM}\]"):
        shards.take(x[0, 0])
    stream = shards.start(network.attn_res, x)
    stream.read()
    with pytest.raises(
        ValueError, match=r"output has shape \[2, 4, 32\], expected 8 tokens in dim"
    ):
        stream.write(x[:, :4])
    with pytest.raises(ValueError, match="a DTensor needs TokenShards of a DeviceMesh"):
        shards.start(network.attn_res, x).read(dtensor=True)
    with pytest.raises(ValueError, match="dim is -1, expected an integer from 0 on"):
        TokenShards(dim=-1)
    if process.world == 4:
        mesh = dist.device_mesh.init_device_mesh(
            process.device.type, (2, 2), mesh_dim_names=("dp", "tp")
        )
        with pytest.raises(ValueError, match="a mesh of 2 dimensions, expected one"):
            TokenShards(mesh)
        TokenShards(mesh["tp"])
    group = dist.new_group([0], timeout=wait_for(process.device.type))
    if process.rank > 0:
        with pytest.raises(ValueError, match="not in the group"):
            TokenShards(group)


# ------------------------------------------------------------------------- FSDP2, DDP, DTensor


@check
def data_parallel(process: Process) -> None:
    """A step of DDP and of FSDP2 has the gradients of one process on all the data."""
    from torch.distributed.fsdp import fully_shard

    for kind in ("ddp", "fsdp"):
        network = make_network(process, 6, 2, torch.float32)
        x = torch.randn(process.world, 2, 5, DIM).to(process.device)
        network(x.flatten(0, 1)).square().mean().backward()
        expected = {name: p.grad.clone() for name, p in network.named_parameters()}
        network.zero_grad()
        if kind == "ddp":
            model: nn.Module = nn.parallel.DistributedDataParallel(network)
        else:
            mesh = dist.device_mesh.init_device_mesh(process.device.type, (process.world,))
            for layer in network.layers:
                fully_shard(layer, mesh=mesh)
            model = fully_shard(network, mesh=mesh)
        for checkpoint in (False, True):
            model.zero_grad()
            model(x[process.rank], checkpoint=checkpoint).square().mean().backward()
            for name, parameter in network.named_parameters():
                gradient = parameter.grad
                gradient = gradient.full_tensor() if kind == "fsdp" else gradient
                torch.testing.assert_close(gradient, expected[name], rtol=1e-3, atol=1e-6)


@check
def pipeline_of_fsdp_stages(process: Process) -> None:
    """2 stages x 2 data-parallel replicas, each stage sharded by fully_shard or wrapped by DDP."""
    if process.world != 4:
        return
    from torch.distributed.fsdp import fully_shard

    mesh = dist.device_mesh.init_device_mesh(
        process.device.type, (2, 2), mesh_dim_names=("pp", "dp")
    )
    pipe = Process(mesh["pp"].get_local_rank(), 2, process.device)

    def shard(module: nn.Module) -> nn.Module:
        return fully_shard(module, mesh=mesh["dp"])

    def replicate(module: nn.Module) -> nn.Module:
        return nn.parallel.DistributedDataParallel(module, process_group=mesh["dp"].get_group())

    for wrap in (shard, replicate):
        # Both replicas have the same data: the mean of their gradients is that of one.
        ours, given, _ = run_pipeline(
            pipe, 8, 3, virtual=2, wrap=wrap, group=mesh["pp"].get_group(), steps=1
        )
        ours = {n: g.full_tensor() if hasattr(g, "full_tensor") else g for n, g in ours.items()}
        assert_pipeline((ours, given, None))


# ------------------------------------------------------------------------------ three AdamW steps


def adamw(process: Process, parameters) -> torch.optim.Optimizer:
    # On a GPU in float32: a larger eps keeps gradients that are but rounding from being steps.
    eps = 1e-2 if process.device.type == "cuda" else 1e-8
    return torch.optim.AdamW(parameters, lr=1e-2, eps=eps, weight_decay=0.1)


def assert_trained(process: Process, pairs: dict[str, tuple[Tensor, Tensor]]) -> None:
    tolerance = 1e-3 if process.device.type == "cuda" else 1e-7
    for name, (ours, expected) in pairs.items():
        ours = ours.full_tensor() if hasattr(ours, "full_tensor") else ours
        torch.testing.assert_close(
            ours, expected, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def exact_dtype(process: Process) -> torch.dtype:
    return torch.float32 if process.device.type == "cuda" else torch.float64


@check
def steps_of_a_pipeline(process: Process) -> None:
    network = make_network(process, 8, 3, exact_dtype(process))
    layout = PipelineLayout.even(8, 3, process.world, 2)
    x = torch.randn(3, 8, 5, DIM).to(network.norms[0])  # of three steps, four micro-batches each
    target = torch.randn_like(x)
    own = {stage: Stage(network, layout, stage) for stage in layout.stages_of(process.rank)}
    stages = make_stages(own, (2, 5, DIM), x.dtype, device=process.device)
    runner = ScheduleInterleaved1F1B(stages, 4, loss_fn=square_loss, scale_grads=False)
    embed = torch.ones_like(x[0, 0, 0]).requires_grad_()
    ours = adamw(process, [p for module in own.values() for p in module.parameters()])
    alone = adamw(process, [embed, *network.parameters()])
    last = layout.num_stages - 1 in own
    for batch, goal in zip(x, target, strict=True):
        ours.zero_grad()
        alone.zero_grad()
        inputs = (batch,) if 0 in own else ()
        runner.step(*inputs, target=goal if last else None, losses=[] if last else None)
        for part_of, goal_of in zip(batch.chunk(4), goal.chunk(4), strict=True):
            square_loss(network(part_of * embed), goal_of).backward()
        ours.step()
        alone.step()
    for stage, module in own.items():
        sites, sublayers = layout.sites(stage), layout.sublayers(stage)
        rows = slice(sites.start, sites.stop)
        whole = network.attn_res
        pairs = {
            "queries": (module.attn_res.queries, whole.queries[rows]),
            "key weights": (module.attn_res.key_weight, whole.key_weight[rows]),
        }
        if stage == 0:
            pairs["embedding"] = (module.embed, embed)
        for local, index in enumerate(sublayers):
            for name, parameter in module.layers[local].named_parameters():
                pairs[f"{index} {name}"] = (parameter, network.layers[index].get_parameter(name))
        for local, index in enumerate(sites):
            pairs[f"norm {index}"] = (module.norms[local], network.norms[index])
        assert_trained(process, pairs)


@check
def steps_of_sequence_shards(process: Process) -> None:
    network = mlp_network(process, exact_dtype(process), 8, 3)
    for layer in network.layers:
        layer.down.bias.requires_grad_(False)
    parts = [ColumnRow(layer, process.rank, process.world) for layer in network.layers]
    mine = copy.deepcopy(network)
    shared = [mine.attn_res.queries, mine.attn_res.key_weight, *mine.norms]
    ours = adamw(process, [*shared, *(p for part_of in parts for p in part_of.parameters())])
    alone = adamw(process, network.parameters())
    shards = TokenShards()
    for _ in range(3):
        x = torch.randn(8, 2, DIM).to(network.norms[0])
        target = torch.randn_like(x)
        ours.zero_grad()
        alone.zero_grad()
        square_loss(network(x), target).backward()
        stream = shards.start(mine.attn_res, x)
        for part_of, norm in zip(parts, mine.norms, strict=False):
            stream.write(part_of(stream.read(norm)))
        local = stream.finish(mine.norms[-1], gather=False)
        square_loss(local, shards.own(target)).backward()
        shards.sync_gradients(shared)
        ours.step()
        alone.step()
    pairs = {
        "queries": (mine.attn_res.queries, network.attn_res.queries),
        "key weights": (mine.attn_res.key_weight, network.attn_res.key_weight),
    }
    for index, norm in enumerate(network.norms):
        pairs[f"norm {index}"] = (mine.norms[index], norm)
    for index, (part_of, layer) in enumerate(zip(parts, network.layers, strict=True)):
        a, b = layer.up.weight.chunk(2)
        pairs[f"{index} a"] = (part_of.a, a[part_of.rows])
        pairs[f"{index} b"] = (part_of.b, b[part_of.rows])
        pairs[f"{index} down"] = (part_of.down, layer.down.weight[:, part_of.rows])
    assert_trained(process, pairs)


@check
def steps_of_fully_shard(process: Process) -> None:
    from torch.distributed.fsdp import fully_shard

    network = make_network(process, 6, 2, exact_dtype(process))
    sharded = copy.deepcopy(network)
    mesh = dist.device_mesh.init_device_mesh(process.device.type, (process.world,))
    for layer in sharded.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    ours, alone = adamw(process, sharded.parameters()), adamw(process, network.parameters())
    for _ in range(3):
        x = torch.randn(process.world, 2, 5, DIM).to(network.norms[0])
        ours.zero_grad()
        alone.zero_grad()
        network(x.flatten(0, 1)).square().mean().backward()
        sharded(x[process.rank]).square().mean().backward()
        ours.step()
        alone.step()
    expected = dict(network.named_parameters())
    assert_trained(process, {n: (p, expected[n]) for n, p in sharded.named_parameters()})


# ------------------------------------------------------------------------------- running them


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(device: str, seconds: float | None = None) -> datetime.timedelta:
    """How long a collective waits for a peer; a GPU's own work takes no time to speak of."""
    return datetime.timedelta(seconds=seconds or (TIMEOUT if device == "cpu" else TIMEOUT / 2))


def connect(rank: int, world: int, port: int, device: str, seconds: float | None = None) -> Process:
    torch.set_num_threads(1)
    here = torch.device(device, rank) if device == "cuda" else torch.device(device)
    if device == "cuda":
        # Matrix products repeat their bits on every stream.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.cuda.set_device(here)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=world,
        timeout=wait_for(device, seconds),
        device_id=here if device == "cuda" else None,
    )
    return Process(rank, world, here)


def leave(code: int) -> NoReturn:
    """Ends the process at once, without the interpreter's own end.

    ``destroy_process_group`` does not join Gloo's threads as long as a sharded module holds the
    group. One that drops the last reference to a collective's tensors while the interpreter ends
    is unwound through a destructor, and aborts the process (seen in PyTorch 2.13, one run in 40).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run_checks(
    rank: int, world: int, port: int, device: str, folder: str, only: str, first: int
) -> None:
    """One process: the checks from a number on, until one fails; it tells of each in a file."""

    def tell(**what: object) -> None:
        with Path(folder, f"{rank}.jsonl").open("a") as file:
            file.write(json.dumps(what) + "\n")

    index = -1
    try:
        process = connect(rank, world, port, device)
        for index, function in list(enumerate(chosen(only)))[first:]:
            tell(begun=index)
            if rank == 0:
                print(f"{world} processes: {function.__name__}", flush=True)
            begin = time.perf_counter()
            torch.manual_seed(1000 + len(function.__name__))
            function(process)
            dist.barrier()
            tell(passed=index, seconds=time.perf_counter() - begin)
        dist.destroy_process_group()
    except BaseException:
        tell(failed=index, text=traceback.format_exc())
        leave(1)
    leave(0)


def chosen(only: str) -> list[Callable[[Process], None]]:
    """The checks with this in their names."""
    return [function for function in CHECKS if only in function.__name__]


def run_all(world: int, device: str, folder: Path, only: str = "") -> list[str]:
    """What failed, with what each process says of it; none is left out for another's failure."""
    names = [function.__name__ for function in chosen(only)]
    end = time.monotonic() + LIMIT[device]
    failures: list[str] = []
    first = 0
    while first < len(names):
        round_ = folder / str(first)
        round_.mkdir()
        seconds = end - time.monotonic()
        if seconds < 20:
            failures.append(f"not run for lack of time: {', '.join(names[first:])}")
            break
        codes = spawn(run_checks, world, device, round_, only, first, seconds=seconds)
        told = [_told(round_ / f"{rank}.jsonl") for rank in range(world)]
        passed = [max((e["passed"] for e in each if "passed" in e), default=-1) for each in told]
        if codes == [0] * world and min(passed) == len(names) - 1:
            break
        failed = max(first, min(passed) + 1)
        lines = [f"{names[failed]} at {world} processes:"]
        for rank, (code, each) in enumerate(zip(codes, told, strict=True)):
            text = next((e["text"] for e in each if "failed" in e), "")
            at = names[each[-1].get("begun", -1)] if each and "begun" in each[-1] else "no check"
            lines.append(f"rank {rank}, exit code {code}: {text or f'no error; it was in {at}'}")
        failures.append("\n".join(lines))
        print(failures[-1], flush=True)
        if not all(any("begun" in event for event in each) for each in told):
            failures.append("the processes did not find each other; the rest was not run")
            break
        first = failed + 1
    return failures


def _told(file: Path) -> list[dict]:
    """What a process wrote, which may have ended in the middle of a line or before the first."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def lose_a_peer(
    rank: int, world: int, port: int, device: str, folder: str, kind: str = "pipeline"
) -> None:
    """The last process dies in the middle of a step; the others end with an error."""
    if device == "cuda":
        # An error where the host waits; without it, NCCL's watchdog ends the process by a signal.
        os.environ["TORCH_NCCL_BLOCKING_WAIT"] = "1"
    process = connect(rank, world, port, device, 20)
    step = step_of_shards if kind == "shards" else step_of_pipeline
    step(process, lambda: None)
    begin = time.perf_counter()
    try:
        step(process, (lambda: os._exit(9)) if process.last else lambda: None)
        if device == "cuda":
            torch.cuda.synchronize()
    except RuntimeError as error:
        text = {"error": str(error), "seconds": time.perf_counter() - begin}
        Path(folder, f"{rank}.json").write_text(json.dumps(text))
        leave(3)
    leave(0)


def step_of_pipeline(process: Process, hook: Callable[[], None]) -> None:
    def hooked(module: nn.Module) -> nn.Module:
        module.register_forward_pre_hook(lambda *_: hook())
        return module

    run_pipeline(process, 8, 3, virtual=2, wrap=hooked)


def miss_a_block(rank: int, world: int, port: int, device: str, folder: str) -> None:
    """The last process has lost the blocks that it kept, in the middle of a step."""
    process = connect(rank, world, port, device, 20)
    network = make_network(process, 8, 3, torch.float32)
    layout = PipelineLayout.even(8, 3, world, 2)
    own = {stage: Stage(network, layout, stage) for stage in layout.stages_of(rank)}
    stages = make_stages(own, (2, 5, DIM), torch.float32, device=process.device)
    runner = ScheduleInterleaved1F1B(stages, 4, loss_fn=square_loss, scale_grads=False)
    if process.last:
        own[2 * world - 1].register_forward_pre_hook(
            lambda *_: stages[0].cache.current.sources.clear()
        )
    x = torch.randn(8, 5, DIM).to(process.device)
    try:
        with shared_errors(stages):
            inputs = (x,) if rank == 0 else ()
            target = x if process.last else None
            runner.step(*inputs, target=target, losses=[] if process.last else None)
    except RuntimeError as error:
        Path(folder, f"{rank}.json").write_text(json.dumps({"error": str(error)}))
        leave(3)
    leave(0)


def step_of_shards(process: Process, hook: Callable[[], None]) -> None:
    """Forward and backward; the hook runs in a layer in the middle."""
    network = mlp_network(process, torch.float32, 4, 2)
    x = torch.randn(8, 2, DIM).to(process.device)
    stream = TokenShards().start(network.attn_res, x)
    for index, (layer, norm) in enumerate(zip(network.layers, network.norms, strict=False)):
        h = stream.read(norm)
        if index == 2:
            hook()
        stream.write(layer(h) / process.world)
    stream.finish(network.norms[-1]).sum().backward()


def spawn(
    target: Callable,
    world: int,
    device: str,
    folder: Path,
    *more: object,
    seconds: float = 120,
    grace: float = GRACE,
) -> list[int]:
    """Exit codes of the processes, none of which is left behind; -9: it had to be ended.

    Args:
        seconds: for all of it.
        grace: for the others, after a process has failed.
    """
    context = mp.get_context("spawn")
    port = free_port()
    workers = [
        context.Process(target=target, args=(rank, world, port, device, str(folder), *more))
        for rank in range(world)
    ]
    for worker in workers:
        worker.start()
    end = time.monotonic() + seconds
    try:
        while any(worker.is_alive() for worker in workers) and time.monotonic() < end:
            if any(worker.exitcode for worker in workers):
                end, grace = min(end, time.monotonic() + grace), float("inf")
            time.sleep(0.05)
    finally:
        for worker in workers:
            if worker.is_alive():
                worker.kill()
            worker.join()
    return [-9 if worker.exitcode is None else worker.exitcode for worker in workers]


if __name__ == "__main__":  # by hand: python tests/python/distributed_checks.py WORLD [NAME]
    import tempfile

    where = Path(tempfile.mkdtemp())
    chosen_device = "cuda" if torch.cuda.is_available() else "cpu"
    if sys.argv[2:3] == ["lose_a_peer"]:
        print(spawn(lose_a_peer, int(sys.argv[1]), chosen_device, where, *sys.argv[3:], grace=60))
        sys.exit()
    failed = run_all(int(sys.argv[1]), chosen_device, where, *sys.argv[2:])
    for event in (e for file in sorted(where.glob("*/0.jsonl")) for e in _told(file)):
        if "seconds" in event:
            name = chosen("".join(sys.argv[2:]))[event["passed"]].__name__
            print(f"{event['seconds']:6.1f} s  {name}")
    print(f"{len(failed)} failed")
    sys.exit(bool(failed))
