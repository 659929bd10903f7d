"""``SiteWeights``: what the reading sites of a model have learned, folded once."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flash_attn_res import _check

if TYPE_CHECKING:
    from flash_attn_res.modules import BlockAttnRes


@dataclasses.dataclass(frozen=True)
class SiteNames:
    """Names of the parameters in a checkpoint; ``{layer}`` counts decoder layers from 0.

    Each decoder layer has two sites, before its attention and before its MLP; one more stands
    before the output head. ``query`` is the pseudo-query ([D] or a projection [1, D]), ``key`` the
    RMSNorm weight of the keys, ``norm`` the weight of the norm that follows the site.
    """

    attention_query: str
    attention_key: str
    attention_norm: str
    mlp_query: str
    mlp_key: str
    mlp_norm: str
    output_query: str
    output_key: str
    output_norm: str

    def prefixed(self, prefix: str) -> SiteNames:
        """The same names behind a prefix, such as ``"language_model."``."""
        names = {name: prefix + value for name, value in dataclasses.asdict(self).items()}
        return SiteNames(**names)


KIMI_K3_NAMES = SiteNames(
    attention_query="model.layers.{layer}.self_attention_res_proj.weight",
    attention_key="model.layers.{layer}.self_attention_res_norm.weight",
    attention_norm="model.layers.{layer}.input_layernorm.weight",
    mlp_query="model.layers.{layer}.mlp_res_proj.weight",
    mlp_key="model.layers.{layer}.mlp_res_norm.weight",
    mlp_norm="model.layers.{layer}.post_attention_layernorm.weight",
    output_query="model.output_attn_res_proj.weight",
    output_key="model.output_attn_res_norm.weight",
    output_norm="model.norm.weight",
)
"""Parameters of Kimi K3 as its checkpoints name them."""


class SiteWeights:
    """Folded queries and norm weights of all sites of a model with L sublayers.

    Site l < L stands before sublayer l (attention and MLP count separately), site L before the
    output head. The folded query of a site is ``u = w * g`` in float32: pseudo-query times key
    weight, which is all that the keys' RMSNorm weight does.

    Args:
        queries: [L + 1, R] pseudo-queries.
        key_weights: [L + 1, R] RMSNorm weights of the keys, or None for ones.
        norm_weights: [L + 1, D] weights of the norms behind the sites.
        eps: of the keys' RMSNorm in the model, if known.
        block_size: sublayers to a block in the model, if known.

    Attributes:
        queries: [L + 1, R] float32, folded.
        norm_weights: [L + 1, D].
        eps, block_size: as given; None when unknown. A :class:`Runner` takes them where it is given
            none, and refuses others.
    """

    def __init__(
        self,
        queries: Tensor,
        key_weights: Tensor | None,
        norm_weights: Tensor,
        *,
        eps: float | None = None,
        block_size: int | None = None,
    ) -> None:
        op = type(self).__name__
        self.eps = None if eps is None else _check.positive(op, "eps", eps)
        self.block_size = block_size
        if block_size is not None:
            _check.positive_int(op, "block_size", block_size)
        for name, given in (("queries", queries), ("norm_weights", norm_weights)):
            checked = _check.tensor(op, name, given)
            if checked.dim() != 2 or checked.shape[0] < 2:
                raise ValueError(
                    f"{op}: {name} has shape {_check.shape_text(checked)}, expected [L + 1, D] "
                    "with L >= 1"
                )
        if len(norm_weights) != len(queries):
            raise ValueError(
                f"{op}: norm_weights has shape {_check.shape_text(norm_weights)}, expected "
                f"{len(queries)} rows like queries {_check.shape_text(queries)}"
            )
        if queries.shape[1] > norm_weights.shape[1]:
            raise ValueError(
                f"{op}: queries has shape {_check.shape_text(queries)}, expected at most "
                f"{norm_weights.shape[1]} columns, the width of norm_weights"
            )
        _check.same_device(op, "norm_weights", norm_weights, "queries", queries)
        _check.value_dtype(op, "queries", queries)
        if key_weights is not None:
            key_weights = _check.tensor(op, "key_weights", key_weights)
            if key_weights.shape != queries.shape:
                raise ValueError(
                    f"{op}: key_weights has shape {_check.shape_text(key_weights)}, expected "
                    f"{_check.shape_text(queries)} like queries"
                )
            _check.same_device(op, "key_weights", key_weights, "queries", queries)
            _check.value_dtype(op, "key_weights", key_weights)
        _check.value_dtype(op, "norm_weights", norm_weights)
        folded = queries.detach().float()
        if key_weights is not None:
            folded = folded * key_weights.detach().float()
        self.queries = folded.contiguous()
        self.norm_weights = norm_weights.detach().contiguous()

    @property
    def num_sublayers(self) -> int:
        """L."""
        return len(self.queries) - 1

    @property
    def dim(self) -> int:
        """D."""
        return int(self.norm_weights.shape[1])

    def to(self, device: torch.device | str) -> SiteWeights:
        """The same weights on another device."""
        return SiteWeights(
            self.queries.to(device),
            None,
            self.norm_weights.to(device),
            eps=self.eps,
            block_size=self.block_size,
        )

    @classmethod
    def from_module(
        cls, module: BlockAttnRes, norm_weights: Sequence[Tensor] | Tensor
    ) -> SiteWeights:
        """Of a trained :class:`flash_attn_res.BlockAttnRes` with scale 1, with its eps and blocks.

        Args:
            module: queries and key weights of the L + 1 sites.
            norm_weights: L + 1 weights [D], the last one of the norm before the output head.
        """
        if module.scale != 1.0:
            raise ValueError(f"SiteWeights.from_module: scale is {module.scale}, expected 1")
        stacked = norm_weights if isinstance(norm_weights, Tensor) else torch.stack([*norm_weights])
        return cls(
            module.queries,
            module.key_weight,
            stacked,
            eps=module.eps,
            block_size=module.block_size,
        )

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        num_layers: int | None = None,
        names: SiteNames = KIMI_K3_NAMES,
        source: str = "state_dict",
    ) -> SiteWeights:
        """Of a model with two sites to each decoder layer, such as Kimi K3.

        Args:
            state_dict: tensors by name; those that are no site's are left alone.
            num_layers: decoder layers; by default as many as the names show.
            names: how the parameters are called.
            source: what messages call the mapping.

        Raises:
            KeyError: parameters are missing, or a layer among those that are there; they are named.
            ValueError: one has another shape than the first, named with both shapes.
            TypeError: one is no tensor of a floating dtype that values may have.
        """
        if num_layers is None:
            num_layers = _count_layers(state_dict, names, source)
        _check.positive_int("SiteWeights", "num_layers", num_layers)
        if num_layers > len(state_dict):  # before a name is made for each of them
            raise KeyError(
                f"SiteWeights: {source} has {len(state_dict)} parameters, too few for {num_layers} "
                "layers"
            )
        sites = [
            tuple(name.format(layer=layer) for name in triple)
            for layer in range(num_layers)
            for triple in (
                (names.attention_query, names.attention_key, names.attention_norm),
                (names.mlp_query, names.mlp_key, names.mlp_norm),
            )
        ]
        sites.append((names.output_query, names.output_key, names.output_norm))
        missing = [name for site in sites for name in site if name not in state_dict]
        if missing:
            shown = ", ".join(missing[:8]) + (", ..." if len(missing) > 8 else "")
            raise KeyError(f"SiteWeights: {source} lacks {len(missing)} parameters: {shown}")

        dim = state_dict[sites[0][2]].numel()

        def stacked(position: int) -> Tensor:
            rows = []
            for site in sites:
                weight = _check.tensor("SiteWeights", site[position], state_dict[site[position]])
                _check.value_dtype("SiteWeights", site[position], weight)
                if weight.numel() != dim or weight.shape[-1:] != (dim,):
                    raise ValueError(
                        f"SiteWeights: {site[position]} has shape {_check.shape_text(weight)}, "
                        f"expected [{dim}] or [1, {dim}] like {sites[0][2]}"
                    )
                rows.append(weight.reshape(-1))
            return torch.stack(rows)

        return cls(stacked(0), stacked(1), stacked(2))

    @classmethod
    def from_safetensors(
        cls,
        path: str | pathlib.Path,
        *,
        num_layers: int | None = None,
        names: SiteNames = KIMI_K3_NAMES,
        device: torch.device | str = "cpu",
    ) -> SiteWeights:
        """Of a safetensors file, or of a folder of them (a sharded checkpoint).

        Only the sites' parameters are read. Needs the package ``safetensors``.

        Raises:
            FileNotFoundError: there is no such file, or the folder has no ``*.safetensors``.
            ValueError: a file is truncated or no safetensors file, or two files have a parameter of
                one name; they are named.
            KeyError, ValueError, TypeError: as for :meth:`from_state_dict`.
        """
        path = pathlib.Path(path)
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files or not all(file.is_file() for file in files):
            raise FileNotFoundError(f"SiteWeights: {path} is no safetensors file nor a folder of")
        tensors: dict[str, Tensor] = {}
        wanted = [re.compile(pattern) for pattern in _patterns(names)]
        origin: dict[str, pathlib.Path] = {}
        for file in files:
            found = _read_safetensors(file, wanted, str(device))
            for name in found:
                if name in origin:
                    raise ValueError(
                        f"SiteWeights: {name} is in {origin[name]} and in {file}: expected the "
                        "shards of one checkpoint, or one file"
                    )
                origin[name] = file
            tensors.update(found)
        return cls.from_state_dict(tensors, num_layers=num_layers, names=names, source=str(path))


def _read_safetensors(
    file: pathlib.Path, wanted: Iterable[re.Pattern[str]], device: str
) -> dict[str, Tensor]:
    """The tensors of one file whose names match."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt", device=device) as opened:
            return {
                name: opened.get_tensor(name)
                for name in opened.keys()  # noqa: SIM118
                if any(pattern.fullmatch(name) for pattern in wanted)
            }
    except (SafetensorError, OSError, ValueError, json.JSONDecodeError) as error:
        raise ValueError(
            f"SiteWeights: {file} is damaged, or no safetensors file ({error})"
        ) from error


def _patterns(names: SiteNames) -> list[str]:
    return [
        re.escape(name).replace(re.escape("{layer}"), "[0-9]+")
        for name in dataclasses.asdict(names).values()
    ]


def _count_layers(state_dict: Mapping[str, Tensor], names: SiteNames, source: str) -> int:
    """Layers among the sites' names, which must be numbered from 0 without a gap."""
    pattern = re.compile(re.escape(names.attention_query).replace(re.escape("{layer}"), "([0-9]+)"))
    # As words: a name may hold a number that no machine counts to.
    found = {match[1] for match in map(pattern.fullmatch, state_dict) if match}
    for layer in range(len(found)):
        if str(layer) not in found:
            other = max(found, key=lambda word: (len(word), word))
            raise KeyError(
                f"SiteWeights: {source} has no parameter named "
                f"{names.attention_query.format(layer=layer)}, but one of layer {other:.20}"
            )
    if not found:
        raise KeyError(
            f"SiteWeights: {source} has no parameter named {names.attention_query.format(layer=0)}"
        )
    return len(found)
