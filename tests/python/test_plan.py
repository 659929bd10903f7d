"""The planner: what it counts, that its choice is the cheapest, what it can be told."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from flash_attn_res import BlockAttnRes, Plan
from flash_attn_res.plan import MIN_GAIN, Costs, Group

COSTS = {
    "training": Costs(),
    "gradients in storage": Costs(grad_bytes=2),
    "float32": Costs(storage_bytes=4),
    "kept": Costs(recompute=False),
    "float32 sums": Costs(sum_bytes=4),
    "inference": Costs(training=False),
}
every_cost = pytest.mark.parametrize("costs", COSTS.values(), ids=COSTS.keys())


def all_plans(num_sublayers: int, block_size: int, costs: Costs) -> list[Plan]:
    """Every way to cut the sites into groups at block boundaries, in both forms."""
    ends = [*range(block_size, num_sublayers, block_size), num_sublayers]
    plans = []
    for cuts in itertools.product([False, True], repeat=len(ends)):
        starts = [0, *(end for end, cut in zip(ends, cuts, strict=True) if cut)]
        bounds = [*starts, num_sublayers + 1]
        for forms in itertools.product([False, True], repeat=len(starts)):
            groups = tuple(
                Group(
                    index,
                    first,
                    bounds[index + 1] - first,
                    -(-first // block_size) + 1
                    if first == num_sublayers
                    else first // block_size + 1,
                    form,
                )
                for index, (first, form) in enumerate(zip(starts, forms, strict=True))
            )
            plans.append(Plan(num_sublayers, block_size, groups, costs))
    return plans


@every_cost
@pytest.mark.parametrize("shape", [(1, 1), (7, 1), (9, 2), (12, 3), (8, 8), (14, 5)])
def test_the_choice_is_the_cheapest(shape: tuple[int, int], costs: Costs) -> None:
    cheapest = min(plan.bytes for plan in all_plans(*shape, costs))
    chosen = Plan.choose(*shape, costs)
    assert cheapest <= chosen.bytes <= cheapest / (1 - MIN_GAIN)
    single = Plan.choose(*shape, costs, group_blocks=1)
    assert chosen.bytes == single.bytes or chosen.bytes < (1 - MIN_GAIN) * single.bytes


def count_bytes(
    plan: Plan,
    monkeypatch: pytest.MonkeyPatch,
    training: bool,
    sum_dtype: torch.dtype | None = None,
) -> int:
    """Bytes of values that the operators were given in one step, per token and unit of width."""
    from flash_attn_res.tape import operators

    T, D = 64, 128
    total = [0]

    def bytes_of(given: object) -> int:
        """Statistics, queries and weights do not count."""
        if isinstance(given, (list, tuple)):
            return sum(bytes_of(item) for item in given)
        return given.nbytes if isinstance(given, Tensor) and given.numel() >= T * D else 0

    def counted(real, stack: int | None, written: int | None):
        def call(*arguments):
            results = real(*arguments)
            total[0] += bytes_of(arguments) + bytes_of(results)
            if stack is not None and arguments[stack] is not None:
                whole = bytes_of(arguments[stack])
                row = whole // len(arguments[stack])
                # A backward that is told where the gate goes writes over the row.
                again = written is not None and arguments[stack + 1] is not None
                total[0] -= whole - (2 * row if again else row)
            if written is not None and arguments[written + 1] is True:
                total[0] += bytes_of(arguments[written])
            return results

        return call

    # The stack of which a site has one row, and the arguments that are added to when the next one
    # is true: read as well as written.
    for name, (stack, written) in {
        "attend": (None, None),
        "read": (0, None),
        "attend_backward": (None, 9),
        "read_backward": (2, 14),
    }.items():
        monkeypatch.setattr(operators, name, counted(getattr(operators, name), stack, written))
    module = BlockAttnRes(plan.num_sublayers, D, plan.block_size, sum_dtype=sum_dtype)
    module._training_plans[torch.bfloat16] = module._inference_plan = plan
    weight = torch.ones(D, dtype=torch.bfloat16)
    x = torch.randn(T, D).to(torch.bfloat16).requires_grad_()
    with torch.set_grad_enabled(training):
        stream = module.start(x)
        for _ in range(plan.num_sublayers):
            stream.write(stream.read(weight) * 2)
        y = stream.finish(weight)
    if training:
        y.backward(torch.ones_like(y))
    return round(total[0] / (T * D))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(6, 6), (8, 4), (16, 8), (12, 1), (9, 2)])
def test_counted_bytes_are_what_the_operators_are_given(
    shape: tuple[int, int], training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan.choose(*shape, Costs(training=training))
    measured = count_bytes(plan, monkeypatch, training)
    # Not seen here: the additions that close blocks. Counted more than moved: a buffer's first
    # addition, which finds nothing to add to.
    closings = sum(group.two_phase and group.first > 0 for group in plan.groups)
    closing = 12 if training else 6
    fresh = 4 * (len(plan.blocks) + 1) if training else 0
    assert measured <= plan.bytes
    assert plan.bytes <= measured + closings * closing + fresh


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("shape", [(6, 6), (8, 4), (16, 8), (12, 1), (9, 2)])
def test_counted_bytes_of_float32_sums(
    shape: tuple[int, int], training: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = Plan.choose(*shape, Costs(training=training, sum_bytes=4))
    assert plan.bytes >= Plan.choose(*shape, Costs(training=training)).bytes
    if shape[1] == 1:
        assert plan.bytes == Plan.choose(*shape, Costs(training=training)).bytes
    measured = count_bytes(plan, monkeypatch, training, torch.float32)
    # Casts of gradients and of sums that a read makes a source are not seen here, either.
    monkeypatch.setattr(Costs, "handed_on", lambda *_: 0)
    monkeypatch.setattr(Costs, "promote", lambda *_: 0)
    closings = sum(group.two_phase and group.first > 0 for group in plan.groups)
    fresh = 4 * (len(plan.blocks) + 1) if training else 0
    assert measured <= plan.bytes <= measured + closings * 8 + fresh


def test_known_networks() -> None:
    two_phase = [group.two_phase for group in Plan.choose(32, 8).groups]
    assert two_phase == [False, True, True, True]
    assert Plan.choose(32, 8).groups[-1].size == 9  # the output reads through the last phase 1
    k3 = BlockAttnRes.kimi_k3(93, 16).plan()
    assert [group.size for group in k3.groups] == [24] * 7 + [19]
    full = BlockAttnRes(32, 16, 1).plan()
    assert full.bytes < 0.5 * Plan.choose(32, 1, forms="one_shot").bytes
    assert all(site.num_sources - site.first_direct <= 9 for site in full.sites)


@every_cost
@pytest.mark.parametrize("shape", [(1, 1), (13, 1), (9, 2), (14, 5), (24, 24)])
def test_sites(shape: tuple[int, int], costs: Costs) -> None:
    """Every site reads each completed source once: through phase 1, directly or as the sum."""
    L, S = shape
    for plan in (Plan.choose(L, S, costs), Plan.choose(L, S, costs, forms="one_shot")):
        for site in plan.sites:
            labels = plan.site_sources(site.index)
            pending = site.index > 0 and not (site.opens and site.slot == 0)
            assert site.num_sources + pending == len(labels)
            covered = site.group.num_sources if site.slot >= 0 else 0
            assert covered == site.first_direct <= site.num_sources


def test_overrides() -> None:
    forms = ["one_shot", "two_phase", "one_shot", "auto"]
    groups = BlockAttnRes(16, 8, 4, forms=forms).plan().groups
    assert [group.two_phase for group in groups[:3]] == [False, True, False]
    assert not any(g.two_phase for g in BlockAttnRes(16, 8, 1, forms="one_shot").plan().groups)
    grouped = BlockAttnRes(16, 8, 1, forms="two_phase", group_blocks=4).plan().groups
    assert [group.size for group in grouped[-3:]] == [4, 4, 5]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"forms": "three_phase"}, "'three_phase' is no form, expected one of auto, two_phase"),
        ({"forms": ["auto"]}, "forms has 1 items, expected 4, one for each block"),
        ({"group_blocks": 0}, "group_blocks is 0, expected 1 to 32"),
        ({"group_blocks": 33}, "group_blocks is 33, expected 1 to 32"),
        ({"grad_dtype": torch.float16}, "grad_dtype is torch.float16, expected torch.float32, or"),
        ({"sum_dtype": torch.bfloat16}, "sum_dtype is torch.bfloat16, expected torch.float32, or"),
        (
            {"sum_dtype": torch.float32, "stochastic_rounding": 1},
            "sum_dtype is torch.float32 and stochastic_rounding is given, expected one of them",
        ),
        ({"keep_phase1": "some"}, "keep_phase1 is 'some', expected one of"),
    ],
)
def test_bad_options(options: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        BlockAttnRes(16, 8, 4, **options)


def test_groups_that_do_not_cover_the_network() -> None:
    with pytest.raises(ValueError, match=r"the groups cover the sites \[0, 1\], expected 0 to 4"):
        Plan(4, 2, (Group(0, 0, 2, 1, False),))


def test_printing() -> None:
    text = str(BlockAttnRes(12, 32, 5).plan())
    assert "12 sublayers in 3 blocks of 5; bytes read and written for one token" in text
    assert "10-11, out" in text
    sized = str(BlockAttnRes(32, 2048, 8).plan(tokens=16384))
    assert "GB read and written for T = 16384, D = 2048, forward and backward" in sized
    assert "2-byte values and 4-byte gradient buffers" in sized
    wide = BlockAttnRes(32, 2048, 8, sum_dtype=torch.float32)
    assert "2-byte values, 4-byte sums and 4-byte gradient buffers" in str(wide.plan())
    assert "byte sums" not in str(wide.plan(dtype=torch.float32))
    inference = BlockAttnRes(32, 2048, 8).plan(training=False, dtype=torch.float32)
    assert str(inference).splitlines()[0].endswith("forward, 4-byte values")
    with pytest.raises(TypeError, match=r"plan: dtype is torch\.int64"):
        BlockAttnRes(4, 8).plan(dtype=torch.int64)
