"""Phase 1 in Triton, element-wise, one program a token: to measure an eviction policy, no more.

out_s = sum_n softmax_n(<q_s, v_n> rsqrt(mean(v_n^2) + eps)) v_n. A token's rows stay in registers,
and every token reads all queries again: the setting of the claim.
"""

import triton
import triton.language as tl


@triton.jit
def phase1(
    v,  # (N,T,D) bfloat16
    q,  # (S,D) float32
    out,  # (S,T,D) bfloat16
    T,
    eps,
    N: tl.constexpr,
    S: tl.constexpr,
    D: tl.constexpr,
    POLICY: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    n = tl.arange(0, N)
    d = tl.arange(0, D)
    rows = tl.load(v + n[:, None].to(tl.int64) * T * D + token * D + d[None, :]).to(tl.float32)
    inverse = tl.rsqrt(tl.sum(rows * rows, 1) / D + eps)  # (N)
    for s in range(S):
        query = tl.load(q + s * D + d, eviction_policy=POLICY)  # (D)
        logits = tl.sum(rows * query[None, :], 1) * inverse  # (N)
        weights = tl.exp(logits - tl.max(logits, 0))
        weights = weights / tl.sum(weights, 0)
        mixture = tl.sum(weights[:, None] * rows, 0)  # (D)
        where = out + s * T.to(tl.int64) * D + token * D + d
        tl.store(where, mixture.to(tl.bfloat16))
