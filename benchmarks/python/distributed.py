"""What Attention Residuals cost over two devices, beside plain residuals.

Usage: distributed.py [--out FILE] [--traces FOLDER] [--device cuda|cpu] [--quick] [--rounds N]
                      [--test pipeline|prefill] [--budget SECONDS] [--limit SECONDS]

Starts one process a device and measures, in bfloat16 with SwiGLU sublayers (RMSNorm, D -> 2D gated
-> D):

  pipeline   a training step of two stages, 1F1B and interleaved 1F1B: plain residuals, which send
             one value a transition, and AttnRes with cross-stage caching
  prefill    forward of a two-way tensor-parallel network whose tokens are sharded between
             sublayers: plain residuals (add and norm on the shard), and AttnRes with and without
             phase 1 on a side stream beside the all-gather

Contenders share their layers' weights and run in turn in every round; a time is the slower rank's.
Ratios are medians of the rounds' ratios to plain. Peaks are of allocated memory, weights included,
and of the rank that has more. A profile of one run of each prefill says, for each rank, for how
long collectives ran (their waiting for the other rank included), and for how much of that phase 1
ran beside them; --traces keeps the Chrome traces of rank 0 with and without the side stream.

The result file is written after each case. A case that fails is a row with its error, and a fresh
pair of processes goes on with the next. After --limit seconds all ends, with the rows until then.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import gc
import gzip
import json
import pathlib
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleInterleaved1F1B
from torch.nn.functional import rms_norm, silu

from flash_attn_res import BlockAttnRes
from flash_attn_res.cli.bench import harness
from flash_attn_res.distributed import PipelineLayout, StageAttnRes, TokenShards, make_stages

RESULTS = pathlib.Path(__file__).resolve().parents[1] / "results"
WORLD = 2
EPS = 1e-6
DTYPE = torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Case:
    test: str
    layers: int
    block_size: int
    tokens: int
    dim: int
    micro_batches: int = 1
    virtual: int = 1


# The narrow ones first: they take seconds. Every one has blocks that are read through a phase 1,
# in the pipeline on both ranks. At D = 7168 a rank holds 15 GB of weights and as much of gradients,
# and up to 40 GB of what layers keep: it needs a GPU of 100 GB or more.
CASES = [
    Case("prefill", 64, 8, 16384, 2048),
    Case("pipeline", 32, 8, 8192, 2048, 8, 1),
    Case("pipeline", 32, 8, 8192, 2048, 8, 2),
    Case("prefill", 96, 24, 16384, 7168),
    Case("pipeline", 48, 8, 4096, 7168, 4, 1),
    Case("pipeline", 48, 8, 4096, 7168, 4, 2),
]
SMALL = [
    Case("prefill", 12, 4, 32, 64),
    Case("pipeline", 8, 2, 32, 64, 4, 1),
    Case("pipeline", 8, 2, 32, 64, 4, 2),
]


class SwiGlu(nn.Module):
    """D -> 2D gated -> D; with ``parts`` ranks, this rank's columns and rows of it."""

    def __init__(self, dim: int, parts: int, device: torch.device) -> None:
        super().__init__()
        made: dict[str, Any] = {"bias": False, "device": device, "dtype": DTYPE}
        self.up = nn.Linear(dim, 4 * dim // parts, **made)
        self.down = nn.Linear(2 * dim // parts, dim, **made)
        self.norm = nn.Parameter(torch.ones(dim, device=device, dtype=DTYPE))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up(x).chunk(2, -1)
        return self.down(silu(a) * b)


@functools.lru_cache(maxsize=1)
def make_layers(count: int, dim: int, parts: int, device: torch.device) -> list[SwiGlu]:
    """On the device, once for all contenders and for the cases of one size in a row."""
    torch.manual_seed(1 + dist.get_rank())
    return [SwiGlu(dim, parts, device) for _ in range(count)]


class Stage(nn.Module):
    def __init__(
        self, layout: PipelineLayout, stage: int, dim: int, layers: list[SwiGlu], *, plain: bool
    ) -> None:
        super().__init__()
        like = layers[0].norm
        self.layers = nn.ModuleList(layers)
        self.final = nn.Parameter(torch.ones_like(like))
        self.first, self.last = stage == 0, stage == layout.num_stages - 1
        self.attn_res = None
        if not plain:
            self.attn_res = StageAttnRes(layout, stage, dim, device=like.device, dtype=DTYPE)
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


def pipeline_step(case: Case, device: torch.device, *, plain: bool) -> Callable[[], None]:
    """One step of the pipeline."""
    layout = PipelineLayout.even(case.layers, case.block_size, WORLD, case.virtual)
    stages_here = layout.stages_of(dist.get_rank())
    count = sum(len(layout.sublayers(stage)) for stage in stages_here)
    layers = iter(make_layers(count, case.dim, 1, device))
    own = {}
    for stage in stages_here:
        mine = [next(layers) for _ in layout.sublayers(stage)]
        own[stage] = Stage(layout, stage, case.dim, mine, plain=plain)
    like = (1, case.tokens, case.dim)
    stages: list[PipelineStage] = []
    if plain:
        value = torch.empty(like, dtype=DTYPE, device="meta").requires_grad_()
        for stage, module in own.items():
            stages.append(
                PipelineStage(
                    module,
                    stage,
                    layout.num_stages,
                    device,
                    input_args=(value,),
                    output_args=(value,),
                )
            )
    else:
        stages = make_stages(own, like, DTYPE, device=device)
    one = case.virtual == 1
    kind = Schedule1F1B if one else ScheduleInterleaved1F1B
    runner = kind(stages[0] if one else stages, case.micro_batches, loss_fn=loss, scale_grads=False)
    x = torch.randn(case.micro_batches, *like[1:], device=device, dtype=DTYPE)
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

    return step


def pipeline(case: Case, device: torch.device) -> dict[str, Callable[[], None]]:
    return {
        name: pipeline_step(case, device, plain=name == "plain")
        for name in ("plain", "flash_attn_res")
    }


def prefill(case: Case, device: torch.device) -> dict[str, Callable[[], None]]:
    """The forwards of the tensor-parallel network."""
    layers = make_layers(case.layers, case.dim, WORLD, device)
    torch.manual_seed(1)
    attn_res = BlockAttnRes(case.layers, case.dim, case.block_size, device=device)
    nn.init.normal_(attn_res.queries, std=0.02)
    x = torch.randn(case.tokens, case.dim, device=device, dtype=DTYPE)
    sharded = {overlap: TokenShards(overlap=overlap) for overlap in (False, True)}

    def plain() -> None:
        shards = sharded[False]
        with torch.no_grad():
            h = shards.own(x)
            for layer in layers:
                normed = rms_norm(h, layer.norm.shape, layer.norm, EPS)
                h = h + shards.scatter(layer(shards.gather(normed, case.tokens)))

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


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], None], device: torch.device) -> float:
    """Of the slower rank."""
    dist.barrier()
    wait(device)
    begin = time.perf_counter()
    run()
    wait(device)
    took = torch.tensor([time.perf_counter() - begin], device=device)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return took.item()


def measure(
    contenders: dict[str, Callable[[], None]], rounds: int, budget: float, device: torch.device
) -> dict[str, dict[str, Any]]:
    """ms, ratio to plain and peak of each, of at most ``rounds`` rounds; 3 at least."""
    cuda = device.type == "cuda"
    for run in contenders.values():
        seconds(run, device)
    # Known to all ranks: each takes the slower one's time.
    expected = sum(seconds(run, device) for run in contenders.values())
    rounds = max(3, min(rounds, int(budget / expected)))
    times: dict[str, list[float]] = {name: [] for name in contenders}
    peaks = dict.fromkeys(contenders, 0.0)
    for index in range(rounds):
        names = list(contenders)
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            if cuda:
                torch.cuda.reset_peak_memory_stats(device)
            times[name].append(seconds(contenders[name], device))
            if cuda:
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated(device) / 2**30)
    highest = torch.tensor(list(peaks.values()), device=device)
    dist.all_reduce(highest, dist.ReduceOp.MAX)
    found = {}
    for name, peak in zip(times, highest.tolist(), strict=True):
        ratios = [a / b for a, b in zip(times[name], times["plain"], strict=True)]
        found[name] = {
            **harness.spread("ms", [taken * 1e3 for taken in times[name]], 3),
            **harness.spread("ratio", ratios, 4),
            "rounds": rounds,
            "peak_gib": round(peak, 3) if cuda else None,
        }
    return found


def profile_of(
    run: Callable[[], None], device: torch.device, trace: pathlib.Path
) -> dict[str, float]:
    """ms of collectives, of phase 1, and of both at a time, on this rank's GPU in one run."""
    from torch.profiler import ProfilerActivity, profile, record_function

    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()  # the profiler's own start is on this one's bill
        wait(device)
        dist.barrier()
        wait(device)
        with record_function("measured"):
            run()
            wait(device)
    trace.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(trace))
    events = json.loads(gzip.decompress(trace.read_bytes()))["traceEvents"]
    begin = min(
        event["ts"]
        for event in events
        if event.get("name") == "measured" and event.get("cat") == "user_annotation"
    )
    kinds = {"all_gather": [], "reduce_scatter": [], "phase1": []}
    for event in events:
        if event.get("cat") != "kernel" or event["ts"] < begin:
            continue
        name = event["name"].lower().replace("_", "")
        for kind, word in (
            ("all_gather", "allgather"),
            ("reduce_scatter", "reducescatter"),
            ("phase1", "attend"),
        ):
            if word in name:
                kinds[kind].append((event["ts"], event["ts"] + event["dur"]))
                break
    collectives = kinds["all_gather"] + kinds["reduce_scatter"]
    both = sum(
        max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in collectives for b in kinds["phase1"]
    )
    total = {f"{kind}_ms": sum(end - first for first, end in kinds[kind]) for kind in kinds}
    total["both_ms"] = both
    return {name: round(value / 1e3, 3) for name, value in total.items()}


def topology() -> dict[str, str]:
    """How the GPUs are connected: what nvidia-smi says, and in a word (NV18, PIX, SYS)."""
    try:
        text = subprocess.run(
            ["nvidia-smi", "topo", "-m"], capture_output=True, text=True, check=True, timeout=20
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {"link": "unknown", "topology": "unknown"}
    lines = [line.split() for line in text.splitlines()]
    first = next((line for line in lines if line[:1] == ["GPU0"] and "X" in line), [])
    return {"link": first[2] if len(first) > 2 else "unknown", "topology": text}


def work(rank: int, port: int, options: argparse.Namespace, folder: str, first: int) -> None:
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
        timeout=datetime.timedelta(seconds=60),
        device_id=device if cuda else None,
    )
    machine: dict[str, Any] = {}
    if rank == 0:
        machine = harness.describe_machine(device)
        machine["device"] = f"{WORLD} x {machine['device']}"
        machine |= topology() if cuda else {"link": "gloo"}
        if cuda:
            version = ".".join(str(number) for number in torch.cuda.nccl.version())
            machine["versions"]["nccl"] = version
    kept = pathlib.Path(folder, "rows.jsonl")
    default = RESULTS / f"{harness.short_name(device)}-distributed.json"
    out = options.out or default
    cases = chosen(options)
    for index in range(first, len(cases)):
        case = cases[index]
        if rank == 0:
            pathlib.Path(folder, "begun").write_text(str(index))
            print(f"{time.strftime('%X')} {case}", flush=True)
        runs = (pipeline if case.test == "pipeline" else prefill)(case, device)
        found = measure(runs, options.rounds, options.budget, device)
        problems = []
        if cuda and case.test == "prefill":
            for name, run in runs.items():
                words = name.replace(", ", "-").replace(" ", "-")
                file = f"prefill-{case.dim}-{words}-{rank}.json.gz"
                kept_trace = options.traces if rank == 0 and name != "plain" else None
                own = profile_of(run, device, pathlib.Path(kept_trace or folder, file))
                each: list[Any] = [None] * WORLD
                dist.all_gather_object(each, own)
                found[name]["profile"] = each
                if name == "flash_attn_res" and not all(one["phase1_ms"] > 0 for one in each):
                    problems.append(f"{case}: no phase 1 in the profile of {name}")
        if rank == 0:
            rows = [
                {"package": package, **dataclasses.asdict(case), **numbers}
                for package, numbers in found.items()
            ]
            with kept.open("a") as file_of_rows:
                for row in rows:
                    print(json.dumps(row), flush=True)
                    file_of_rows.write(json.dumps(row) + "\n")
            every = [json.loads(line) for line in kept.read_text().splitlines()]
            out.parent.mkdir(parents=True, exist_ok=True)
            harness.write_results(out, "distributed", machine, None, every, options.quick)
            pathlib.Path(folder, "out").write_text(str(out))
            with pathlib.Path(folder, "problems").open("a") as file_of_problems:
                file_of_problems.writelines(problem + "\n" for problem in problems)
        del runs
        gc.collect()  # stages and schedules refer to each other
        if cuda:
            torch.cuda.empty_cache()
    dist.barrier()
    dist.destroy_process_group()


def chosen(options: argparse.Namespace) -> list[Case]:
    cases = SMALL if options.quick else CASES
    return [case for case in cases if options.test in (None, case.test)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=pathlib.Path, help="default: GPU-distributed.json in results")
    parser.add_argument("--traces", help="folder for Chrome traces")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="small shapes, to try it out")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--test", choices=("pipeline", "prefill"), help="only these cases")
    parser.add_argument("--budget", type=float, default=18, help="seconds for a case's rounds")
    parser.add_argument("--limit", type=float, default=300, help="seconds after which all ends")
    options = parser.parse_args()
    end = time.monotonic() + options.limit
    failed = False
    with tempfile.TemporaryDirectory() as folder:
        begun, first, count = pathlib.Path(folder, "begun"), 0, len(chosen(options))
        while first < count:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            arguments = (port, options, folder, first)
            workers = mp.spawn(work, args=arguments, nprocs=WORLD, join=False)
            try:
                done = False
                while not done and time.monotonic() < end:
                    done = workers.join(timeout=1, grace_period=3)
                if done:
                    break
                print(f"ended after {options.limit:g} s", file=sys.stderr)
                return 1
            except Exception as error:
                failed = True
                at = int(begun.read_text()) if begun.exists() else first
                case = chosen(options)[at]
                print(f"{case}: {error}", file=sys.stderr, flush=True)
                row = {"package": "flash_attn_res", **dataclasses.asdict(case)}
                row["error"] = str(error).strip().splitlines()[-1]
                with pathlib.Path(folder, "rows.jsonl").open("a") as rows:
                    rows.write(json.dumps(row) + "\n")
                written = pathlib.Path(folder, "out")
                if written.exists():  # the cases to come write it again
                    document = json.loads(pathlib.Path(written.read_text()).read_text())
                    document["rows"].append(row)
                    pathlib.Path(written.read_text()).write_text(json.dumps(document, indent=1))
                if not begun.exists():
                    return 1
                first = at + 1
            finally:
                for worker in workers.processes:
                    if worker.is_alive():
                        worker.kill()
                        worker.join()
        problems = pathlib.Path(folder, "problems")
        if problems.exists() and problems.read_text():
            print(problems.read_text(), file=sys.stderr)
            failed = True
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
