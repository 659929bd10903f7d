"""Whole networks: L sublayers in blocks, where the errors of all sites and sums add up.

The sublayers are the same for everybody and better than what is measured: a random two-layer MLP in
float32 (float64 in the reference) whose output is rounded to the storage dtype once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from flash_attn_res import BlockAttnRes
from flash_attn_res.cli.accuracy import peers
from flash_attn_res.cli.accuracy.families import generator_for, storable
from flash_attn_res.cli.accuracy.modes import Mode

BLOCK_SIZE = 8
TOKENS, DIM = 64, 128

#: Parameters and input of a network, which all get gradients.
LEAVES = {
    "embedding": "d embedding",
    "queries": "d queries",
    "key_weight": "d key weight",
    "weight": "d norm weight",
}


@dataclass
class Network:
    """L sublayers; leaves as in :data:`LEAVES`, with a row for each of the L + 1 sites."""

    num_sublayers: int
    seed: int

    def __post_init__(self) -> None:
        L, D = self.num_sublayers, DIM
        generator = generator_for(self.seed, "network", L)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.inputs = {
            "embedding": storable(normal(TOKENS, D)),
            "queries": storable(normal(L + 1, D) / D**0.5),
            "key_weight": storable(1 + 0.1 * normal(L + 1, D)),
            "weight": storable(1 + 0.1 * normal(L + 1, D)),
        }
        self.matrices = normal(L, 2, D, D) / D**0.5
        self.cotangent = storable(normal(TOKENS, D))

    def layer(self, index: int, x: Tensor) -> Tensor:
        """Sublayer `index` on x [T, D], in float32, or in float64 where x is."""
        wide = torch.promote_types(x.dtype, torch.float32)
        first, second = self.matrices[index].to(x.device, wide)
        return (silu(x.to(wide) @ first) @ second).to(x.dtype)


Forward = Callable[[Network, dict[str, Tensor]], Tensor]


def stream(network: Network, x: dict[str, Tensor], **options: Any) -> Tensor:
    """This package's stream; in float64 the reference."""
    module = BlockAttnRes(network.num_sublayers, DIM, BLOCK_SIZE, eps=peers.EPS, **options)
    # In the place of the parameters, so that the leaves get the gradients.
    del module.queries, module.key_weight
    module.queries, module.key_weight = x["queries"], x["key_weight"]  # type: ignore[assignment]
    flow = module.start(x["embedding"])
    for index in range(network.num_sublayers):
        flow.write(network.layer(index, flow.read(x["weight"][index])))
    return flow.finish(x["weight"][-1])


Site = Callable[[int, list[Tensor]], Tensor]  # site and its sources [T, D] to x [T, D]


def one_shot(network: Network, x: dict[str, Tensor], site: Site) -> Tensor:
    """Every site reads all its sources, the running sum as the last of them."""
    sources, partial = [x["embedding"]], None
    for index in range(network.num_sublayers):
        if index % BLOCK_SIZE == 0 and partial is not None:
            sources, partial = [*sources, partial], None
        output = network.layer(
            index, site(index, sources if partial is None else [*sources, partial])
        )
        partial = output if partial is None else partial + output
    assert partial is not None
    return site(network.num_sublayers, [*sources, partial])


def site_inputs(x: dict[str, Tensor], index: int) -> dict[str, Tensor]:
    """The parameters of one site, named as in `peers.Case`."""
    rows = slice(index, index + 1)
    return {"queries": x["queries"][rows], "key_weight": x["key_weight"][rows]}


def of_package(name: str, create: Callable[[peers.Case], peers.Function]) -> Forward:
    """A network of another package's operations: one-shot reads, or phase 1 and merges."""

    def case(op: str, N: int, S: int, like: Tensor) -> peers.Case:
        # The inputs are given to the function; the case says only what it will be asked.
        given = {"queries": like}
        return peers.Case(op, N, S, TOKENS, DIM, like.device.type, like.dtype, given)

    def norm(h: Tensor, weight: Tensor) -> Tensor:
        return peers.normalised(h.float(), {"weight": weight}).to(h.dtype)

    def packed(sources: list[Tensor]) -> Tensor | list[Tensor]:
        return sources if name in peers.LISTS else torch.stack(sources)

    def run_one_shot(op: str, network: Network, x: dict[str, Tensor]) -> Tensor:
        def site(index: int, sources: list[Tensor]) -> Tensor:
            weight = x["weight"][index]
            values: dict = site_inputs(x, index) | {"sources": packed(sources)}
            if op == "oneshot_norm":
                values["weight"] = weight
            h = create(case(op, len(sources), 1, x["embedding"]))(values)[0]
            return h if op == "oneshot_norm" else norm(h, weight)

        return one_shot(network, x, site)

    def forward(network: Network, x: dict[str, Tensor]) -> Tensor:
        for op in ("oneshot_norm", "oneshot"):
            try:
                create(case(op, 2, 1, x["embedding"]))
            except peers.UnsupportedError:
                continue
            return run_one_shot(op, network, x)

        def attend(sources: list[Tensor], rows: slice) -> list[Tensor]:
            values = {"sources": torch.stack(sources)}
            values |= {name: x[name][rows] for name in ("queries", "key_weight")}
            S = len(values["queries"])
            return create(case("phase1", len(sources), S, x["embedding"]))(values)

        def advance(
            index: int, o: Tensor, lse: Tensor, partial: Tensor, update: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            partial = partial if update is None else partial + update
            values = site_inputs(x, index) | {"o": o, "lse": lse, "partial": partial}
            h = create(case("merge", 0, 1, x["embedding"]))(values)[0]
            return norm(h, x["weight"][index]), partial

        return two_phase(network, x, attend, norm, advance)

    return forward


def two_phase(
    network: Network,
    x: dict[str, Tensor],
    attend: Callable[[list[Tensor], slice], list[Tensor]],
    norm: Callable[[Tensor, Tensor], Tensor],
    advance: Callable[[int, Tensor, Tensor, Tensor, Tensor | None], tuple[Tensor, Tensor]],
) -> Tensor:
    """Phase 1 once a block, then a merge a site; the output's site reads all blocks."""
    L = network.num_sublayers
    sources = [x["embedding"]]
    for first in range(0, L, BLOCK_SIZE):
        end = min(first + BLOCK_SIZE, L)
        out, lse = attend(sources, slice(first, end))
        partial = update = None
        for index in range(first, end):
            if partial is None:
                h = norm(out[0], x["weight"][index])
            else:
                h, partial = advance(index, out[index - first], lse[index - first], partial, update)
            output = network.layer(index, h)
            if partial is None:
                partial = output
            else:
                update = output
        assert partial is not None
        sources.append(partial if update is None else partial + update)
    out, _ = attend(sources, slice(L, L + 1))
    return norm(out[0], x["weight"][-1])


def of_mode(mode: Mode) -> Forward:
    """This package's network."""
    return lambda network, x: stream(network, x, **mode.options)
