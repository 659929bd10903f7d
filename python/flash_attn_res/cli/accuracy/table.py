"""The error table: every family, operation and tensor, for every mode and package.

A row has the keys of :func:`row_of`. All errors are against this package's double-precision
reference on the same inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from flash_attn_res.cli.accuracy import families, network, peers
from flash_attn_res.cli.accuracy.families import Inputs, Size, generator_for, storable
from flash_attn_res.cli.accuracy.metrics import Errors, measure
from flash_attn_res.cli.accuracy.modes import MODES, Mode, run
from flash_attn_res.cli.accuracy.states import States

OURS = "flash_attn_res"

#: What the operations are called here, their outputs, and their leaves with the names of gradients.
OUTPUTS = {
    "phase1": ("output", "lse"),
    "oneshot_norm": ("output",),
    "advance": ("output", "partial sum"),
}
GRADIENTS = {
    "sources": "d sources",
    "o": "d phase-1 output",
    "lse": "d lse",
    "partial": "d partial",
    "update": "d update",
    "queries": "d queries",
    "key_weight": "d key weight",
    "weight": "d norm weight",
}

#: Storage dtypes of the packages, and in which of them each is measured. All take bfloat16.
STORAGE = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MEASURED_IN = {"eager": ("bf16", "fp16"), "eager (float32 inside)": ("bf16", "fp16", "fp32")}


#: Significant digits of a number in a row, where three do not do.
DIGITS = {"cosine": 9}


@dataclass(frozen=True)
class Contender:
    """A package in a storage mode."""

    package: str
    storage: str
    dtype: torch.dtype  # whose ulps count
    store: Callable[[str, Tensor], Tensor]  # an input, by name, as it is kept
    create: Callable[[peers.Case], peers.Function]
    network: network.Forward
    ops: tuple[str, ...] = (*OUTPUTS, "network")


@dataclass
class Table:
    """Rows, and what could not be run: package, storage, reason and the operations it holds for."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    failures: list[dict[str, Any]] = field(default_factory=list)

    def fail(self, contender: Contender, error: Exception, where: str) -> None:
        """Notes a package's error: once for each reason."""
        kind = "" if isinstance(error, peers.UnsupportedError) else f"{type(error).__name__}: "
        text = kind + (str(error).strip().splitlines() or ["(no message)"])[0]
        entry = {"package": contender.package, "storage": contender.storage, "error": text}
        for known in self.failures:
            if all(known[key] == value for key, value in entry.items()):
                if where not in known["where"]:
                    known["where"].append(where)
                return
        self.failures.append(entry | {"where": [where]})


def ours(mode: Mode) -> Contender:
    """A storage mode of this package."""
    return Contender(
        OURS,
        mode.name,
        mode.value,
        mode.store,
        lambda case: lambda x: mode.run(case.op, x),
        network.of_mode(mode),
        mode.ops,
    )


def package(name: str, storage: str) -> Contender:
    """Another package, or eager PyTorch, with all values in one dtype."""
    dtype = STORAGE[storage]
    create = (peers.EAGER | peers.PEERS)[name]
    plain = Mode(storage, dtype, dtype)
    return Contender(name, storage, dtype, plain.store, create, network.of_package(name, create))


def contenders(modes: Sequence[str], packages: Sequence[str]) -> list[Contender]:
    """Ours in the modes, then the packages as `MEASURED_IN` says."""
    found = [ours(MODES[name]) for name in modes]
    for name in packages:
        found += [package(name, storage) for storage in MEASURED_IN.get(name, ("bf16",))]
    return found


# ---------------------------------------------------------------------------- one operation


def operation_inputs(op: str, x: Inputs) -> dict[str, Tensor]:
    """The leaves of an operation on a family's values, float32 at bfloat16's values."""
    one = slice(0, None if op == "phase1" else 1)
    leaves = {"queries": x.queries[one], "key_weight": x.key_weight[one]}
    if op != "phase1":
        leaves["weight"] = x.norm_weight
    if op != "advance":
        return leaves | {"sources": x.sources}
    # The phase-1 result that the site would be given: exact, then as bfloat16 has it.
    wide = {name: value.double() for name, value in leaves.items()}
    o, lse = run("phase1", wide | {"sources": x.sources.double()})
    leaves |= {"o": storable(o[0].float()), "lse": lse[0].float()}
    return leaves | {"partial": x.partial, "update": x.update}


def results(
    function: peers.Function, leaves: dict[str, Tensor], cotangents: list[Tensor], as_list: bool
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Outputs and the gradients of all leaves; cotangents take the outputs' dtypes."""
    leaves = {name: value.detach().requires_grad_() for name, value in leaves.items()}
    given: dict = dict(leaves)
    if as_list and "sources" in given:
        given["sources"] = list(given["sources"].unbind(0))
    outputs = function(given)
    grads = torch.autograd.grad(
        outputs,
        list(leaves.values()),
        [c.to(o.device, o.dtype) for c, o in zip(cotangents, outputs, strict=False)],
        allow_unused=True,
    )
    found = {
        name: torch.zeros_like(leaf) if grad is None else grad
        for (name, leaf), grad in zip(leaves.items(), grads, strict=True)
    }
    return outputs, found


def add_operation(
    table: Table,
    field: Sequence[Contender],
    op: str,
    family: str,
    size: Size,
    x: Inputs,
    device: str,
    seed: int,
) -> None:
    """All rows of one operation on one family's inputs."""
    leaves = operation_inputs(op, x)
    generator = generator_for(seed, "cotangents", op, family, size)
    shape = leaves["o" if op == "advance" else "sources"].shape[-2:]
    lead = leaves["queries"].shape[:1] if op == "phase1" else ()
    cotangents = [storable(torch.randn(*lead, *shape, generator=generator))]
    if op == "phase1":
        cotangents.append(storable(torch.randn(*lead, shape[0], generator=generator)))
    if op == "advance":
        cotangents.append(storable(torch.randn(*shape, generator=generator)))
    exact: dict[int, tuple[list[Tensor], dict[str, Tensor]]] = {}  # by the number of outputs

    def reference(outputs: int) -> tuple[list[Tensor], dict[str, Tensor]]:
        if outputs not in exact:  # a package without lse has no cotangent for it
            wide = {name: value.double() for name, value in leaves.items()}
            exact[outputs] = results(lambda x: run(op, x)[:outputs], wide, cotangents, False)
        return exact[outputs]

    sizes = {"N": size.N, "S": lead[0] if lead else 1, "T": size.T, "D": size.D}
    for contender in field:
        if op not in contender.ops:
            continue
        stored = {n: contender.store(n, v).to(device) for n, v in leaves.items()}
        case = peers.Case(
            op, **sizes, device=device, dtype=contender.dtype, inputs=stored, cotangents=cotangents
        )
        try:
            function = contender.create(case)
            got = results(function, stored, cotangents, contender.package in peers.LISTS)
        except Exception as error:  # a package's own, of any kind: named, not dropped
            if contender.package == OURS:
                raise
            table.fail(contender, error, op)
            continue
        outputs, grads = got
        exact_outputs, exact_grads = reference(len(outputs))
        pairs = dict(zip(OUTPUTS[op], zip(outputs, exact_outputs, strict=True), strict=False))
        pairs |= {GRADIENTS[n]: (grad, exact_grads[n]) for n, grad in grads.items()}
        for tensor, (value, wanted) in pairs.items():
            errors = measure(value, wanted, contender.dtype)
            table.rows.append(row_of(contender, family, op, sizes, tensor, errors))


def add_network(
    table: Table, field: Sequence[Contender], family: str, device: str, seed: int
) -> None:
    """All rows of a whole network."""
    whole = network.Network(families.NETWORKS[family], seed)

    def through(
        forward: network.Forward, leaves: dict[str, Tensor]
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        return results(lambda x: [forward(whole, x)], leaves, [whole.cotangent], False)

    exact = through(network.stream, {n: v.double() for n, v in whole.inputs.items()})
    sizes = {
        "N": -(-whole.num_sublayers // network.BLOCK_SIZE) + 1,
        "S": network.BLOCK_SIZE,
        "T": network.TOKENS,
        "D": network.DIM,
    }
    for contender in field:
        stored = {n: contender.store(n, v).to(device) for n, v in whole.inputs.items()}
        try:
            outputs, grads = through(contender.network, stored)
        except Exception as error:  # as above
            if contender.package == OURS:
                raise
            table.fail(contender, error, "network")
            continue
        pairs = {"output": (outputs[0], exact[0][0])}
        pairs |= {network.LEAVES[n]: (grad, exact[1][n]) for n, grad in grads.items()}
        for tensor, (value, wanted) in pairs.items():
            errors = measure(value, wanted, contender.dtype)
            table.rows.append(row_of(contender, family, "network", sizes, tensor, errors))


def row_of(
    contender: Contender, family: str, op: str, sizes: dict[str, int], tensor: str, errors: Errors
) -> dict[str, Any]:
    """A row of the result file."""
    numbers = {
        name: value if value is None else float(f"{value:.{DIGITS.get(name, 3)}g}")
        for name, value in vars(errors).items()
    }
    return {
        "package": contender.package,
        "storage": contender.storage,
        "family": family,
        "op": op,
        "shape": sizes,
        "tensor": tensor,
        **{name: value for name, value in numbers.items() if name != "not_finite" or value},
    }


# ------------------------------------------------------------------------------ all of it


@dataclass(frozen=True)
class Plan:
    """What is to be run."""

    families: tuple[str, ...]
    sources: tuple[int, ...]  # N
    queries: int  # S of phase 1
    tokens: int
    dim: int
    device: str
    seed: int


def steps(
    plan: Plan, field: Sequence[Contender], states: Callable[[], States]
) -> Iterator[tuple[str, Callable[[Table], None]]]:
    """The work in pieces: a name for the progress line, and what adds the rows.

    `states` gives the hidden states of the realistic family, when that is reached.
    """
    for family in plan.families:
        if family in families.NETWORKS:

            def add_whole(table: Table, family: str = family) -> None:
                add_network(table, field, family, plan.device, plan.seed)

            yield family, add_whole
            continue
        held = states() if family == families.DEPTH else None
        most = max(plan.sources) if held is None else held.most_sources
        for N in dict.fromkeys(min(N, most) for N in plan.sources):
            if held is None:
                size = Size(N, plan.queries, plan.tokens, plan.dim)
                x = families.draw(family, size, plan.seed)
            else:
                size, x = held.size(N, plan.queries), held.inputs(N, plan.queries)

            def add(table: Table, family: str = family, size: Size = size, x: Inputs = x) -> None:
                for op in OUTPUTS:
                    add_operation(table, field, op, family, size, x, plan.device, plan.seed)

            yield f"{family}, N = {size.N}", add


# --------------------------------------------------------------------------- what it shows


def bar_of(row: dict[str, Any]) -> str | None:
    """The storage in which other packages' errors are a bar to a row of ours."""
    mode = MODES.get(row["storage"])
    return None if mode is None else mode.bar


def same_case(row: dict[str, Any], storage: str | None) -> tuple[Any, ...]:
    """Rows of one tensor on the same inputs, in one storage."""
    shape = tuple(row["shape"].items())
    return storage, row["family"], row["op"], shape, row["tensor"]


def comparisons(
    rows: Sequence[dict[str, Any]],
) -> list[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Every row of ours with those of the other packages that it is held to."""
    others: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        if row["package"] != OURS and row["rel_l2"] is not None:
            others.setdefault(same_case(row, row["storage"]), []).append(row)
    return [
        (row, others[same_case(row, bar_of(row))])
        for row in rows
        if row["package"] == OURS and same_case(row, bar_of(row)) in others
    ]
