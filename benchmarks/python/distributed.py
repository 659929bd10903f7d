"""What Attention Residuals cost over two devices, beside plain residuals.

Usage: distributed.py [--out FILE] [--traces FOLDER] [--device cuda|cpu] [--quick] [--rounds N]

Starts one process a device and measures, in bfloat16 with SwiGLU sublayers (RMSNorm, D -> 2D gated
-> D):

  pipeline   a training step of two stages, 1F1B and interleaved 1F1B: plain residuals, which send
             one value a transition, and AttnRes with cross-stage caching
  prefill    forward of a two-way tensor-parallel network whose tokens are sharded between
             sublayers: plain residuals (add and norm on the shard), and AttnRes with and without
             phase 1 on a side stream beside the all-gather

Contenders run in turn in every round; a time is the slower rank's. Ratios are medians of the
rounds' ratios to plain. A profile of one run of each prefill says for how long communication ran,
and for how much of that phase 1 ran beside it; --traces keeps the Chrome traces.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import pathlib
import socket
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.nn.functional import rms_norm, silu

from flash_attn_res import BlockAttnRes
from flash_attn_res.cli.bench import harness
from flash_attn_res.distributed import PipelineLayout, StageAttnRes, TokenShards, make_stages

RESULT = pathlib.Path(__file__).resolve().parents[1] / "results" / "h100-distributed.json"
WORLD = 2
EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Shape:
    layers: int
    block_size: int
    tokens: int
    dim: int
    micro_batches: int = 8


SHAPES = {
    "pipeline": [Shape(32, 8, 8192, 2048), Shape(24, 24, 4096, 7168, 4)],
    "prefill": [Shape(32, 8, 16384, 2048), Shape(48, 24, 16384, 7168)],
}
SMALL = {
    "pipeline": [Shape(8, 2, 32, 64, 4)],
    "prefill": [Shape(8, 4, 32, 64)],
}


class SwiGlu(nn.Module):
    """D -> 2D gated -> D; with ``parts`` ranks, this rank's columns and rows of it."""

    def __init__(self, dim: int, parts: int = 1) -> None:
        super().__init__()
        self.up = nn.Linear(dim, 4 * dim // parts, bias=False)
        self.down = nn.Linear(2 * dim // parts, dim, bias=False)
        self.norm = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, -1)
        return self.down(silu(a) * b)


class Stage(nn.Module):
    def __init__(self, layout: PipelineLayout, stage: int, dim: int, *, plain: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList(SwiGlu(dim) for _ in layout.sublayers(stage))
        self.final = nn.Parameter(torch.ones(dim))
        self.first, self.last = stage == 0, stage == layout.num_stages - 1
        self.attn_res = None if plain else StageAttnRes(layout, stage, dim)
        if self.attn_res is not None:
            nn.init.normal_(self.attn_res.queries, std=0.02)

    def forward(self, *given: Tensor):
        if self.attn_res is None:
            x = given[0]
            for layer in self.layers:
                x = x + layer(rms_norm(x, layer.norm.shape, layer.norm, EPS))
            return rms_norm(x, self.final.shape, self.final, EPS) if self.last else x
        stream = self.attn_res.start(*given) if self.first else self.attn_res.resume(*given)
        for layer in self.layers:
            stream.sublayer(layer, layer.norm)
        return stream.finish(self.final) if self.last else self.attn_res.export(stream)


def loss(y: Tensor, target: Tensor) -> Tensor:
    return (y.float() * target).mean()


def pipeline_step(
    shape: Shape, virtual: int, device: torch.device, *, plain: bool
) -> tuple[Callable[[], None], list]:
    """One step of the pipeline, and the stages of this rank."""
    rank = dist.get_rank()
    layout = PipelineLayout.even(shape.layers, shape.block_size, WORLD, virtual)
    dtype = torch.bfloat16
    own = {
        stage: Stage(layout, stage, shape.dim, plain=plain).to(device, dtype)
        for stage in layout.stages_of(rank)
    }
    like = (1, shape.tokens, shape.dim)
    stages: list[PipelineStage] = []
    if plain:
        value = torch.empty(like, dtype=dtype, device="meta").requires_grad_()
        for stage, module in own.items():
            count = layout.num_stages
            stages.append(
                PipelineStage(
                    module, stage, count, device, input_args=(value,), output_args=(value,)
                )
            )
    else:
        stages = make_stages(own, like, dtype, device=device)
    kind = Schedule1F1B if virtual == 1 else ScheduleInterleaved1F1B
    runner = kind(
        stages[0] if virtual == 1 else stages, shape.micro_batches, loss_fn=loss, scale_grads=False
    )
    x = torch.randn(shape.micro_batches, *like[1:], device=device, dtype=dtype)
    last = layout.num_stages - 1 in own
    parameters = [parameter for module in own.values() for parameter in module.parameters()]

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        runner.step(
            *((x,) if 0 in own else ()),
            target=x if last else None,
            losses=[] if last else None,
        )

    return step, stages


def prefill(shape: Shape, device: torch.device) -> dict[str, Callable[[], None]]:
    """The forwards of the tensor-parallel network."""
    torch.manual_seed(dist.get_rank())
    dtype = torch.bfloat16
    layers = [SwiGlu(shape.dim, WORLD).to(device, dtype) for _ in range(shape.layers)]
    attn_res = BlockAttnRes(shape.layers, shape.dim, shape.block_size).to(device)
    nn.init.normal_(attn_res.queries, std=0.02)
    x = torch.randn(shape.tokens, shape.dim, device=device, dtype=dtype)
    sharded = {overlap: TokenShards(overlap=overlap) for overlap in (False, True)}

    def plain() -> None:
        shards = sharded[False]
        with torch.no_grad():
            h = shards.own(x)
            for layer in layers:
                normed = rms_norm(h, layer.norm.shape, layer.norm, EPS)
                h = h + shards.scatter(layer(shards.gather(normed, shape.tokens)))

    def attn_residuals(overlap: bool) -> None:
        with torch.no_grad():
            stream = sharded[overlap].start(attn_res, x)
            for layer in layers:
                stream.write(layer(stream.read(layer.norm)))
            stream.finish(gather=False)

    return {
        "plain": plain,
        "flash_attn_res": lambda: attn_residuals(True),
        "flash_attn_res, no overlap": lambda: attn_residuals(False),
    }


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """Of the slower rank."""
    dist.barrier()
    if device.type == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    took = torch.tensor([time.perf_counter() - begin], device=device)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return took.item()


def measure(
    contenders: dict[str, Callable[[], None]], rounds: int, device: torch.device
) -> dict[str, dict[str, float]]:
    """ms and ratio to plain of each."""
    for run in contenders.values():
        for _ in range(2):
            seconds(run, device)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for index in range(rounds):
        names = list(contenders)
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            times[name].append(seconds(contenders[name], device))
    return {
        name: {
            "ms": statistics.median(taken) * 1e3,
            "ratio": statistics.median(a / b for a, b in zip(taken, times["plain"], strict=True)),
        }
        for name, taken in times.items()
    }


def overlap(run: Callable[[], None], device: torch.device, trace: pathlib.Path) -> dict[str, float]:
    """ms of communication, of phase 1, and of both at a time, on this rank's GPU."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA]
    with profile(activities=activities) as profiler:
        run()
        torch.cuda.synchronize(device)
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    spans: dict[str, list[tuple[float, float]]] = {"nccl": [], "phase1": []}
    for event in json.loads(trace.read_text())["traceEvents"]:
        if event.get("cat") != "kernel":
            continue
        name = event["name"].lower()
        span = (event["ts"], event["ts"] + event["dur"])
        if "nccl" in name:
            spans["nccl"].append(span)
        elif "attend" in name or "phase1" in name:
            spans["phase1"].append(span)
    both = sum(
        max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in spans["nccl"] for b in spans["phase1"]
    )
    total = {name: sum(end - first for first, end in each) for name, each in spans.items()}
    return {
        "communication_ms": total["nccl"] / 1e3,
        "phase1_ms": total["phase1"] / 1e3,
        "both_ms": both / 1e3,
    }


def work(rank: int, port: int, options: argparse.Namespace, folder: str) -> None:
    cuda = options.device == "cuda"
    device = torch.device("cuda", rank) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=WORLD,
        timeout=datetime.timedelta(seconds=120),
        device_id=device if cuda else None,
    )
    shapes = SMALL if options.quick else SHAPES
    rows = []

    def add(test: str, shape: Shape, found: dict[str, dict[str, float]], **more: object) -> None:
        for package, numbers in found.items():
            row = {"test": test, "package": package, **dataclasses.asdict(shape), **more, **numbers}
            rows.append(row)
            if rank == 0:
                print(json.dumps(row), flush=True)

    for shape in shapes["pipeline"]:
        for virtual in (1, 2):
            contenders, stages = {}, {}
            for name in ("plain", "flash_attn_res"):
                torch.manual_seed(1)
                contenders[name], stages[name] = pipeline_step(
                    shape, virtual, device, plain=name == "plain"
                )
            found = measure(contenders, options.rounds, device)
            add("pipeline", shape, found, virtual=virtual)
            del contenders, stages
            if cuda:
                torch.cuda.empty_cache()
    for shape in shapes["prefill"]:
        runs = prefill(shape, device)
        found = measure(runs, options.rounds, device)
        if cuda:
            for name, run in runs.items():
                file = (
                    f"prefill-{shape.dim}-{name.replace(', ', '-').replace(' ', '-')}-{rank}.json"
                )
                found[name] |= overlap(run, device, pathlib.Path(options.traces or folder, file))
        add("prefill", shape, found)
        del runs
        if cuda:
            torch.cuda.empty_cache()
    if rank == 0:
        machine = harness.describe_machine(device)
        machine["device"] = f"{WORLD} x {machine['device']}"
        harness.write_results(options.out, "distributed", machine, None, rows)
    dist.barrier()
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, default=RESULT)
    parser.add_argument("--traces", help="folder for Chrome traces")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small shapes, to try it out")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(work, args=(port, options, folder), nprocs=WORLD)


if __name__ == "__main__":
    main()
