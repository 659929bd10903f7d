"""The order in which a rank of a pipeline runs forwards and backwards, and how long it waits.

1F1B for one stage a rank, interleaved 1F1B for several: the orders of ``Schedule1F1B`` and
``ScheduleInterleaved1F1B`` of torch.distributed.pipelining.
"""

from __future__ import annotations

from typing import NamedTuple


class Action(NamedTuple):
    """One micro-batch through one stage."""

    backward: bool
    stage: int
    micro_batch: int


def rounds(num_ranks: int, micro_batches: int) -> int:
    """Of the interleaved schedule: in each, a rank runs M / rounds micro-batches a stage."""
    return max(1, micro_batches // num_ranks)


def check(num_ranks: int, num_virtual: int, micro_batches: int) -> None:
    """Raises ValueError where the interleaved schedule cannot run so many."""
    parts = rounds(num_ranks, micro_batches)
    if num_virtual > 1 and micro_batches % parts:
        raise ValueError(
            f"{micro_batches} micro-batches, expected a multiple of {parts}: the interleaved "
            f"schedule of {num_ranks} ranks runs them in {parts} rounds"
        )


def actions(num_ranks: int, num_virtual: int, micro_batches: int, rank: int) -> list[Action]:
    """What a rank runs, in order."""
    P, V, M = num_ranks, num_virtual, micro_batches
    check(P, V, M)
    each = M if V == 1 else M // rounds(P, M)  # micro-batches before the next stage has its turn

    def action(step: int, backward: bool) -> Action:
        turn, place = divmod(step, each)
        local = turn % V
        stage = (V - 1 - local if backward else local) * P + rank
        return Action(backward, stage, turn // V * each + place)

    total = M * V
    ahead = P - 1 - rank if V == 1 else (V - 1) * each + 2 * (P - 1 - rank)
    ahead = min(ahead, total)
    order = [action(step, False) for step in range(ahead)]
    for step in range(total - ahead):
        order += [action(ahead + step, False), action(step, True)]
    return order + [action(step, True) for step in range(total - ahead, total)]


def bubble(num_ranks: int, num_virtual: int, micro_batches: int) -> float:
    """The share of a step in which a rank waits: stages take equal times, backwards twice those.

    Transfers take no time here. (P - 1) / (V M + P - 1) where P divides M.
    """
    P, V = num_ranks, num_virtual
    orders = [actions(P, V, micro_batches, rank) for rank in range(P)]
    done: dict[Action, int] = {}
    clock, places = [0] * P, [0] * P
    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        for rank, order in enumerate(orders):
            while places[rank] < len(order):
                action = order[places[rank]]
                before = _before(action, P * V)
                if before is not None and before not in done:
                    break
                start = max(clock[rank], 0 if before is None else done[before])
                clock[rank] = done[action] = start + (2 if action.backward else 1)
                places[rank] += 1
    return 1 - 3 * V * micro_batches / max(clock)


def _before(action: Action, num_stages: int) -> Action | None:
    """What another rank must have done."""
    backward, stage, micro_batch = action
    if not backward:
        return Action(False, stage - 1, micro_batch) if stage > 0 else None
    return Action(True, stage + 1, micro_batch) if stage + 1 < num_stages else None
