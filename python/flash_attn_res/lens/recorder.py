"""The depth lens: what each site of a network reads, recorded while the network runs.

.. code-block:: python

    with DepthLens(model) as lens:
        model(inputs)
    report = lens.report()
    print(report.networks[0].sites[5].mean)

For the tokens t of all forward passes under the lens and a site with sources n, with the
probabilities p of ``docs/math.md``::

    mean_n = mean_t p_tn        std_n = sqrt(mean_t (p_tn - mean_n)^2)
    entropy = mean_t -sum_n p_tn log2(p_tn)        (bits; log2 of the number of sources at most)

The lens replaces ``start`` of the modules it watches while it is open, and asks the kernels for the
probabilities that they have anyway; a closed lens leaves nothing behind. Compiled models run in
eager mode under it. Statistics are kept in float64 on the device of the stream: nothing is copied
to the host before :meth:`DepthLens.report`.
"""

from __future__ import annotations

import dataclasses
import math
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from flash_attn_res.modules import BlockAttnRes
from flash_attn_res.plan import EMBEDDING, PARTIAL
from flash_attn_res.stream import Stream

SCHEMA = 1
"""Version of :meth:`DepthReport.to_dict`."""


@dataclasses.dataclass(frozen=True)
class SiteReading:
    """One site: what it can read and how much of each it takes, over all tokens."""

    index: int  #: l; the last is the final aggregation
    name: str  #: the name given to the lens, or "sublayer l", "output"
    sources: list[int]  #: 0 the embedding, j block j, the site's own block included
    partial: bool  #: whether the last source is the running sum of the site's own block
    mean: list[float]  #: mean probability of each source
    std: list[float]  #: its standard deviation over tokens
    entropy: float  #: bits, mean over tokens


@dataclasses.dataclass(frozen=True)
class NetworkReading:
    """All sites of one :class:`BlockAttnRes`."""

    name: str  #: of the module inside the model
    tokens: int  #: over which the means are taken
    source_names: list[str]  #: by label
    sites: list[SiteReading]

    def matrix(self) -> list[list[float | None]]:
        """Mean probabilities, a row for each site, a column for each source; None: not there."""
        table: list[list[float | None]] = []
        for site in self.sites:
            row: list[float | None] = [None] * len(self.source_names)
            for source, mean in zip(site.sources, site.mean, strict=True):
                row[source] = mean
            table.append(row)
        return table

    def readers(self, source: int, count: int = 3) -> list[tuple[int, float]]:
        """The sites that take most of a source: (site, mean probability), largest first.

        Sites that have nothing else to read are left out.
        """
        if not 0 <= source < len(self.source_names):
            raise ValueError(
                f"readers: source is {source}, expected 0 to {len(self.source_names) - 1}"
            )
        found = [
            (site.index, site.mean[site.sources.index(source)])
            for site in self.sites
            if source in site.sources and len(site.sources) > 1
        ]
        return sorted(found, key=lambda pair: -pair[1])[:count]


@dataclasses.dataclass(frozen=True)
class DepthReport:
    """What a lens saw: one reading for each network that ran under it."""

    networks: list[NetworkReading]

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it: what is not finite, which JSON has no number for, is None."""
        values: dict[str, Any] = {"schema": SCHEMA, **dataclasses.asdict(self)}
        for network in values["networks"]:
            for site in network["sites"]:
                site["mean"] = [_finite(value) for value in site["mean"]]
                site["std"] = [_finite(value) for value in site["std"]]
                site["entropy"] = _finite(site["entropy"])
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> DepthReport:
        """The inverse of :meth:`to_dict`.

        Raises:
            ValueError: the values are of another version, or no report.
        """
        if values.get("schema") != SCHEMA:
            raise ValueError(
                f"DepthReport: schema is {values.get('schema')!r}, this version reads {SCHEMA}"
            )
        try:
            networks = [
                NetworkReading(**{**network, "sites": [_site(site) for site in network["sites"]]})
                for network in values["networks"]
            ]
        except (KeyError, TypeError) as error:
            raise ValueError(f"DepthReport: not a report of the depth lens: {error}") from error
        return cls(networks)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _site(values: dict[str, Any]) -> SiteReading:
    """Undoes what :meth:`DepthReport.to_dict` does to a site."""

    def number(value: float | None) -> float:
        return math.nan if value is None else value

    numbers = {name: [number(value) for value in values[name]] for name in ("mean", "std")}
    return SiteReading(**{**values, **numbers, "entropy": number(values["entropy"])})


class DepthLens:
    """Records the probabilities of every :class:`BlockAttnRes` in a model while it is open.

    Args:
        model: a module that is, or contains, at least one :class:`BlockAttnRes`.
        site_names: a name for each of the L + 1 sites, for reports; the model then has one network.

    Raises:
        ValueError: the model has no :class:`BlockAttnRes`, or the names do not fit.
    """

    def __init__(self, model: nn.Module, site_names: list[str] | None = None) -> None:
        self._modules = {
            name or type(module).__name__: module
            for name, module in model.named_modules()
            if isinstance(module, BlockAttnRes)
        }
        if not self._modules:
            raise ValueError(
                f"DepthLens: {type(model).__name__} contains no BlockAttnRes: it has no depth to "
                "look into"
            )
        if site_names is not None:
            counts = [module.num_sublayers + 1 for module in self._modules.values()]
            if counts != [len(site_names)]:
                raise ValueError(
                    f"DepthLens: site_names has {len(site_names)} names, expected one network of "
                    f"as many sites, not {counts} sites"
                )
        self._site_names = site_names
        self._recorders = {
            name: _Recorder(m.num_sublayers + 1) for name, m in self._modules.items()
        }
        self._stance: Any = None

    def __enter__(self) -> DepthLens:
        if self._stance is not None or any(
            "start" in module.__dict__ for module in self._modules.values()
        ):
            raise RuntimeError("DepthLens: a lens is open on this model already")
        self._stance = torch.compiler.set_stance("force_eager")
        self._stance.__enter__()
        for name, module in self._modules.items():
            module.__dict__["start"] = _recording_start(module, self._recorders[name])
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for module in self._modules.values():
            del module.__dict__["start"]
        self._stance.__exit__(kind, error, trace)
        self._stance = None

    def report(self) -> DepthReport:
        """The means so far, of every network that has run.

        Raises:
            RuntimeError: none has, or a forward pass did not reach its end.
        """
        networks = [
            self._network(name, module)
            for name, module in self._modules.items()
            if self._recorders[name].tokens
        ]
        if not networks:
            raise RuntimeError("DepthLens: no forward pass has run under the lens")
        return DepthReport(networks)

    def _network(self, name: str, module: BlockAttnRes) -> NetworkReading:
        recorder, last = self._recorders[name], module.num_sublayers
        tokens = recorder.tokens
        sites = []
        for index in range(last + 1):
            labels = module.site_sources(index)
            total = recorder.totals[index]
            if total is None or recorder.counts[index] != tokens:
                raise RuntimeError(
                    f"DepthLens: {name}: site {index} has seen {recorder.counts[index]} tokens and "
                    f"site 0 {tokens}: a forward pass did not reach stream.finish"
                )
            first, second, entropy = (total / tokens).split([len(labels), len(labels), 1])
            deviation = (second - first.square()).clamp_min(0).sqrt()
            site_name = "output" if index == last else f"sublayer {index + 1}"
            if self._site_names is not None:
                site_name = self._site_names[index]
            partial = labels[-1] == PARTIAL
            if partial:
                labels = [*labels[:-1], len(labels) - 1]
            sites.append(
                SiteReading(
                    index=index,
                    name=site_name,
                    sources=labels,
                    partial=partial,
                    mean=first.tolist(),
                    std=deviation.tolist(),
                    entropy=entropy.item(),
                )
            )
        kind = "sublayer" if module.block_size == 1 else "block"
        count = math.ceil(last / module.block_size) + 1
        names = ["embedding" if j == EMBEDDING else f"{kind} {j}" for j in range(count)]
        return NetworkReading(name, tokens, names, sites)


class _Recorder:
    """Sums over tokens, for each site: probabilities [K], their squares [K], entropy [1]."""

    def __init__(self, sites: int) -> None:
        self.totals: list[Tensor | None] = [None] * sites
        self.counts = [0] * sites

    @property
    def tokens(self) -> int:
        return self.counts[0]

    def add(self, site: int, probs: Tensor) -> None:
        p = probs.detach().double().flatten(0, -2)  # (T, K)
        bits = torch.special.entr(p).sum() / math.log(2)
        sums = torch.cat([p.sum(0), p.square().sum(0), bits[None]])
        total = self.totals[site]
        self.totals[site] = sums if total is None else total + sums
        self.counts[site] += p.shape[0]


class _Probabilities(list[Tensor]):
    """Takes the place of ``Stream.probabilities``: records, and keeps what was asked for."""

    def __init__(self, recorder: _Recorder, keep: bool) -> None:
        super().__init__()
        self._recorder, self._keep, self._site = recorder, keep, 0

    def append(self, probs: Tensor) -> None:
        self._recorder.add(self._site, probs)
        self._site += 1
        if self._keep:
            super().append(probs)


def _recording_start(module: BlockAttnRes, recorder: _Recorder) -> Any:
    def start(
        embedding: Tensor, *, return_probs: bool = False, functional: bool | None = None
    ) -> Stream:
        stream = BlockAttnRes.start(module, embedding, return_probs=True, functional=functional)
        stream.probabilities = _Probabilities(recorder, return_probs)
        return stream

    return start
