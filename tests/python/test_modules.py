"""BlockAttnRes and its stream: schedules, equivalence with plain pre-norm, state, errors."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

import eager
from flash_attn_res import BlockAttnRes
from flash_attn_res.plan import PARTIAL

L, D = 12, 32


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(D, 2 * D), nn.Linear(2 * D, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.nn.functional.silu(self.up(x)))


class Network(nn.Module):
    def __init__(self, block_size: int, num_sublayers: int = L, **options) -> None:
        super().__init__()
        self.attn_res = BlockAttnRes(num_sublayers, D, block_size, **options)
        self.layers = nn.ModuleList(Mlp() for _ in range(num_sublayers))
        self.norms = nn.Parameter(1 + 0.1 * torch.randn(num_sublayers + 1, D))

    def forward(self, x: Tensor, return_probs: bool = False):
        stream = self.attn_res.start(x, return_probs=return_probs)
        for norm, layer in zip(self.norms, self.layers, strict=False):
            stream.write(layer(stream.read(norm)))
        y = stream.finish(self.norms[-1])
        return (y, stream.probabilities) if return_probs else y

    def plain(self, x: Tensor) -> Tensor:
        """The same layers with one running residual."""
        for norm, layer in zip(self.norms, self.layers, strict=False):
            x = x + layer(eager.rms_norm(x, 1e-6) * norm)
        return eager.rms_norm(x, 1e-6) * self.norms[-1]

    def eager(self, x: Tensor) -> Tensor:
        """Attention residuals by their formulas, one site at a time (equation 6 of the paper)."""
        module = self.attn_res
        queries = (
            module.queries if module.key_weight is None else (module.queries * module.key_weight)
        )
        blocks, partial = [x], None
        for site, (norm, layer) in enumerate(zip(self.norms, self.layers, strict=False)):
            if site % module.block_size == 0 and partial is not None:
                blocks, partial = [*blocks, partial], None
            h, _, _ = eager.read(
                queries[site], sources=blocks, partial=partial, norm=True, norm_weight=norm
            )
            output = layer(h)
            partial = output if partial is None else partial + output
        return eager.read(
            queries[-1], sources=[*blocks, partial], norm=True, norm_weight=self.norms[-1]
        )[0]


@pytest.mark.parametrize("block_size", [1, 2, 5, 6, 12, 24])
def test_zero_queries_compute_the_plain_network(block_size: int) -> None:
    # A mixture is the residual over the number of sources, which the norm divides out up to eps;
    # in double precision with this eps the two agree to about eps * sources^2 / mean square.
    network = Network(block_size, eps=1e-12).double()
    x = torch.randn(2, 7, D, dtype=torch.float64)
    torch.testing.assert_close(network(x), network.plain(x), rtol=1e-4, atol=1e-4)
    loss = torch.nn.functional.mse_loss(network.float()(x.float()), torch.zeros(2, 7, D))
    plain = torch.nn.functional.mse_loss(network.plain(x.float()), torch.zeros(2, 7, D))
    torch.testing.assert_close(loss, plain, rtol=1e-4, atol=0)


@pytest.mark.parametrize("block_size", [1, 2, 5, 6, 12])
@pytest.mark.parametrize("key_weight", [True, False])
def test_all_gradients_equal_the_eager_network(block_size: int, key_weight: bool) -> None:
    network = Network(block_size, key_weight=key_weight).double()
    nn.init.normal_(network.attn_res.queries, std=0.5)
    x = torch.randn(3, 5, D, dtype=torch.float64, requires_grad=True)
    tensors = [x, *network.parameters()]
    ours, expected = network(x), network.eager(x)
    torch.testing.assert_close(ours, expected)
    cotangent = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, tensors, cotangent),
        torch.autograd.grad(expected, tensors, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [1, 5, 6])
def test_accuracy_beside_the_eager_network(block_size: int, dtype: torch.dtype) -> None:
    network = Network(block_size)
    nn.init.normal_(network.attn_res.queries, std=0.5)
    x = torch.randn(3, 5, D)
    network, x = network.to(dtype), x.to(dtype)  # the exact network has the rounded weights
    ours, plain = network(x), network.eager(x)
    exact = network.double().eager(x.double())
    eager.assert_close_enough("y", ours.detach(), exact.detach(), plain.detach())


def test_kimi_k3_layout() -> None:
    module = BlockAttnRes.kimi_k3(93, D)
    assert (module.num_sublayers, module.block_size, module.eps) == (186, 24, 1e-5)
    plan = module.plan()
    assert len(plan.blocks) == 8
    assert plan.blocks[-1].size == 18  # 93 = 7 x 12 + 9 decoder layers
    # The model reads N sources so and so often: 24 times each for N = 2..8, 18 times N = 9.
    counts = [len(module.site_sources(site)) for site in range(1, 187)]
    assert [counts.count(n) for n in range(2, 10)] == [24] * 7 + [18]
    assert module.site_sources(0) == [0]
    assert module.site_sources(186) == list(range(9))


def test_kimi_k3_data_flow() -> None:
    """Raw prefix snapshots and resets, as the released model code does it."""
    module = BlockAttnRes.kimi_k3(5, D, block_size=2, eps=1e-6).double()
    nn.init.normal_(module.queries)
    nn.init.normal_(module.key_weight, mean=1.0, std=0.1)
    layers = [Mlp().double() for _ in range(10)]
    x = torch.randn(4, D, dtype=torch.float64)
    queries = module.queries * module.key_weight

    def mix(site: int, snapshots: list[Tensor], prefix: Tensor) -> Tensor:
        return eager.read(queries[site], sources=[*snapshots, prefix])[0]

    snapshots, prefix = [], x
    for layer in range(5):
        h = mix(2 * layer, snapshots, prefix)
        if layer % 2 == 0:
            snapshots, prefix = [*snapshots, prefix], torch.zeros_like(prefix)
        prefix = prefix + layers[2 * layer](h)
        prefix = prefix + layers[2 * layer + 1](mix(2 * layer + 1, snapshots, prefix))
    expected = mix(10, snapshots, prefix)

    stream = module.start(x)
    for layer in layers:
        stream.write(layer(stream.read()))
    torch.testing.assert_close(stream.finish(), expected)


def test_probabilities() -> None:
    network = Network(5)
    nn.init.normal_(network.attn_res.queries)
    x = torch.randn(2, 3, D)
    y, probabilities = network(x, return_probs=True)
    assert torch.equal(y, network(x))
    assert len(probabilities) == L + 1
    for site, probs in enumerate(probabilities):
        assert probs.shape == (2, 3, len(network.attn_res.site_sources(site)))
        assert not probs.requires_grad
        torch.testing.assert_close(probs.sum(-1), torch.ones(2, 3))
    uniform = Network(5)
    _, probabilities = uniform(x, return_probs=True)
    torch.testing.assert_close(probabilities[7], torch.full((2, 3, 3), 1 / 3))


def test_site_sources() -> None:
    module = BlockAttnRes(5, D, 2)
    expected = [[0], [0, PARTIAL], [0, 1], [0, 1, PARTIAL], [0, 1, 2], [0, 1, 2, 3]]
    assert [module.site_sources(site) for site in range(6)] == expected
    with pytest.raises(ValueError, match="site is 6, expected 0 to 5"):
        module.site_sources(6)


def test_state_dict_survives_save_and_load() -> None:
    network = Network(4)
    nn.init.normal_(network.attn_res.queries)
    assert set(network.attn_res.state_dict()) == {"queries", "key_weight"}
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    other = Network(4)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = torch.randn(2, D)
    assert torch.equal(other(x), network(x))


def test_a_resumed_run_rounds_as_one_that_was_not_interrupted() -> None:
    network = Network(4, stochastic_rounding=3).bfloat16()
    assert set(network.attn_res.state_dict()) == {"queries", "key_weight", "rounding_seed"}
    x = torch.randn(2, D).bfloat16()
    network(x)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    expected = [network(x) for _ in range(3)]
    file.seek(0)
    other = Network(4, stochastic_rounding=8).bfloat16()
    other.load_state_dict(torch.load(file, weights_only=True))
    found = [other(x) for _ in range(3)]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not torch.equal(found[0], found[1])


def test_printing() -> None:
    module = BlockAttnRes(12, D, 5)
    assert repr(module) == "BlockAttnRes(12, dim=32, block_size=5, eps=1e-06)"
    assert "query_dim=4" in repr(BlockAttnRes(12, D, query_dim=4, key_weight=False))
    options = {
        "forms": "one_shot",
        "group_blocks": 1,
        "grad_dtype": None,
        "keep_phase1": "last",
        "block_storage": "float8",
    }
    shown = repr(BlockAttnRes(12, D, stochastic_rounding=3, **options))
    assert ", sum_dtype=torch.float32" in repr(BlockAttnRes(12, D, sum_dtype=torch.float32))
    for name, given in options.items():
        assert f", {name}={given!r}" in shown
    assert "stochastic_rounding=..." in shown
    assert "forms" not in repr(BlockAttnRes(12, D, block_storage="float16"))
    text = str(module.plan())
    assert "12 sublayers in 3 blocks of 5" in text
    assert "10-11" in text


def test_query_slices_and_fresh_parameters() -> None:
    module = BlockAttnRes(6, D, 3, query_dim=8)
    assert module.queries.shape == (7, 8)
    assert not module.queries.any()
    assert (module.key_weight == 1).all()
    nn.init.normal_(module.queries)
    module.reset_parameters()
    assert not module.queries.any()


def test_autocast_stream() -> None:
    network = Network(4)
    x = torch.randn(2, 6, D)
    with torch.autocast("cpu", torch.bfloat16):
        y = network(x)
    assert y.dtype == torch.float32
    torch.testing.assert_close(y, network(x), rtol=0.05, atol=0.1)
    y.sum().backward()
    assert all(p.grad is not None for p in network.parameters())


def test_checkpointed_sublayers_give_the_same_gradients() -> None:
    network = Network(4)
    nn.init.normal_(network.attn_res.queries)
    x = torch.randn(2, 6, D)
    network(x).square().sum().backward()
    expected = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    stream = network.attn_res.start(x)
    for norm, layer in zip(network.norms, network.layers, strict=False):
        h = stream.read(norm)
        stream.write(torch.utils.checkpoint.checkpoint(layer, h, use_reentrant=False))
    stream.finish(network.norms[-1]).square().sum().backward()
    for parameter, grad in zip(network.parameters(), expected, strict=True):
        assert torch.equal(parameter.grad, grad)


class TestOrder:
    """The stream refuses calls out of order, at the call that is wrong."""

    @pytest.fixture
    def stream(self):
        return BlockAttnRes(2, D, 2).start(torch.randn(3, D))

    def test_read_twice(self, stream) -> None:
        stream.read()
        with pytest.raises(RuntimeError, match="sublayer 0 of 2 has been read and not written"):
            stream.read()

    def test_write_first(self, stream) -> None:
        with pytest.raises(RuntimeError, match="write: sublayer 0 of 2 has not been read"):
            stream.write(torch.randn(3, D))

    def test_write_twice(self, stream) -> None:
        stream.write(stream.read())
        with pytest.raises(RuntimeError, match="sublayer 1 of 2 has not been read"):
            stream.write(torch.randn(3, D))

    def test_finish_early(self, stream) -> None:
        stream.write(stream.read())
        with pytest.raises(RuntimeError, match="finish: sublayer 1 of 2 is still to come"):
            stream.finish()

    def test_read_too_often(self, stream) -> None:
        for _ in range(2):
            stream.write(stream.read())
        with pytest.raises(RuntimeError, match="all 2 sublayers are done; call finish"):
            stream.read()

    def test_use_after_finish(self, stream) -> None:
        for _ in range(2):
            stream.write(stream.read())
        stream.finish()
        for call in (stream.read, stream.finish, lambda: stream.write(torch.randn(3, D))):
            with pytest.raises(RuntimeError, match="this stream is finished"):
                call()

    def test_a_width_that_changes(self, stream) -> None:
        stream.read()
        with pytest.raises(ValueError, match=r"output has shape \[3, 16\], expected \[3, 32\]"):
            stream.write(torch.randn(3, 16))
