"""Estimators of a teacher's next-token distribution by a few of its tokens, and the entropy of the whole.

    p = softmax(logits / T),   z_i = exp((l_i - max l) / T)

Refuses rows that are no distribution: NaN, +inf, or -inf everywhere.

Reading all logits is what costs, so it is done once: largest logit and sum of every block of tokens. All else looks
into the few blocks that matter. Suffixes: n rows, r rows of a tile, V vocabulary, M blocks of b tokens, K kept tokens,
L blocks looked into, J = K - 1 candidates for heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.errors import NonFiniteError

__all__ = ["check_rows", "entropy_of", "likeliest", "relist", "sample"]

TILE_BYTES = {"cpu": 3 << 19, "cuda": 256 << 20}
"""Logits that are read at once: on a CPU they and their exponentials stay near the core."""

GROUP_ROWS = {"cpu": 128, "cuda": 4096}
"""Rows whose chosen blocks are looked into at once, so that a small operation's fixed cost is shared."""

EXACT_ROWS = 16
"""Rows that the exact path holds at once: it spells all of them out in float64."""


@torch.no_grad()
def sample(logits_nV: Tensor, uniform_n: Tensor, k: int, temperature: float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Exactly K tokens a row whose weights sum to 1 and are an unbiased estimate of p.

        sum_i min(1, p_i / tau) = K;   heads p_i > tau are kept, p^_i = p_i
        the others have running sum S_i in token order; those with u + j in [S_(i-1) / tau, S_i / tau) get p^_i = tau

    E[p^] = p, as one point in every tau of the running sum hits i with probability p_i / tau; hence the gradient of the
    forward KL, q - p^, is unbiased too. Systematic sampling: Madow (1949), Ann. Math. Statist. 20(3). Compare Anshumann
    et al. (2025), arXiv:2503.16870, who draw with replacement.

    logits_nV float [n, V], 1 <= K <= V; uniform_n [n] in [0, 1). Returns ids int64 [n, K], distinct and ascending; the
    heads' probabilities float64 [n, K], 0 where a token was drawn; tau float64 [n]. With fewer than K tokens of
    positive probability all of them are heads, tau is 0, and other tokens fill the row. Raises NonFiniteError.
    """
    parts = [_sample_group(logits_nV[rows], uniform_n[rows].double(), k, temperature) for rows in _groups(logits_nV, k)]
    ids_nK, heads_nK, tau_n = (torch.cat(part) for part in zip(*parts, strict=True))
    return ids_nK, heads_nK, tau_n


@torch.no_grad()
def likeliest(logits_nV: Tensor, k: int, temperatures: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """The K likeliest tokens of every row, and the mass of all others at each temperature. Biased, and says how much.

        log p_T,i = l_i / T - log sum_listed exp(l / T) + log(1 - rest_T),   rest_T = 1 - sum_listed p_T

    logits_nV float [n, V], 1 <= K <= V. Returns ids int64 [n, K], distinct and ascending; their logits less the row's
    largest float [n, K], <= 0; log(rest / (1 - rest)) float64 [n, temperatures], -inf where nothing is left. The rest
    is summed itself: 1 - listed would cancel where the list has nearly all. Raises NonFiniteError.
    """
    parts = [_list_group(logits_nV[rows], k, temperatures) for rows in _groups(logits_nV, k)]
    ids_nK, gaps_nK, odds_nT = (torch.cat(part) for part in zip(*parts, strict=True))
    return ids_nK, gaps_nK, odds_nT


@torch.no_grad()
def relist(ids_nK: Tensor, logprobs_nK: Tensor, *, exhaustive: bool = False) -> tuple[Tensor, Tensor, Tensor]:
    """What `likeliest` returns at T = 1, of tokens whose log-probabilities are known in place of all logits.

        log(rest / (1 - rest)),   rest = max(0, 1 - sum_listed p)

    ids_nK int64 [n, K], distinct; logprobs_nK float64 [n, K], -inf for what fills up a row; `exhaustive` says that
    there are no other tokens. Returns ids ascending; log-probabilities less the row's largest float64 [n, K]; log-odds
    of the rest float64 [n, 1], -inf where nothing is left. Of a rest the error is that of the given sum, some 1e-7 for
    numbers of 32 bits. Raises NonFiniteError.
    """
    ids_nK, order_nK = ids_nK.sort(-1)
    logprobs_nK = logprobs_nK.gather(-1, order_nK)
    top_n1 = logprobs_nK.amax(-1, keepdim=True)
    check_rows(top_n1.isfinite())
    listed_n1 = logprobs_nK.exp().sum(-1, keepdim=True)
    rest_n1 = torch.zeros_like(listed_n1) if exhaustive else (1.0 - listed_n1).clamp(min=0.0)
    return ids_nK, logprobs_nK - top_n1, (rest_n1 / listed_n1).log()


@torch.no_grad()
def entropy_of(logits_nV: Tensor) -> Tensor:
    """Entropy at T = 1, -sum_i p_i log p_i, [n], nats, float32 (float64 for float64 logits). Raises NonFiniteError."""
    logits_nV = _wide(logits_nV)
    entropy_n = logits_nV.new_empty(len(logits_nV))
    gaps_rV, work_rV = _workspace(logits_nV), _workspace(logits_nV)
    for rows in _tiles(logits_nV):
        tile_rV = logits_nV[rows]
        top_r1 = tile_rV.amax(-1, keepdim=True)
        check_rows(top_r1.isfinite())
        # Below -200 an exponential is 0 beside 1 in any precision, and 0 * -inf would be NaN.
        gap_rV = torch.sub(tile_rV, top_r1, out=gaps_rV[: len(tile_rV)]).clamp_(min=-200)
        z_rV = torch.exp(gap_rV, out=work_rV[: len(tile_rV)])
        total_r = z_rV.sum(-1)
        entropy_n[rows] = total_r.log() - z_rV.mul_(gap_rV).sum(-1) / total_r
    return entropy_n


def check_rows(usable_n: Tensor) -> None:
    """Raise NonFiniteError unless all rows are usable, bool [n]. A row whose largest logit is finite has no NaN."""
    wrong = int((~usable_n).sum())
    if wrong:
        raise NonFiniteError(
            f"teacher: what it says at {wrong} of {usable_n.numel()} positions is no distribution (NaN, +inf, or -inf "
            f"everywhere). Use teacher.dtype=fp32, or look at the teacher's weights."
        )


@dataclass(frozen=True, slots=True)
class _Blocks:
    """Rows of logits seen as blocks of `width` tokens; the last one overlaps its neighbour where they do not fit."""

    logits_nV: Tensor
    width: int

    @classmethod
    def of(cls, logits_nV: Tensor, k: int) -> _Blocks:
        """Narrow blocks for large K: K of them are looked into."""
        return cls(_wide(logits_nV).contiguous(), min(128 if k <= 32 else 64, logits_nV.shape[1]))

    @property
    def count(self) -> int:
        """M."""
        return -(-self.logits_nV.shape[1] // self.width)

    def fold(self, tile_rV: Tensor, largest: bool) -> Tensor:
        """Largest value or sum of every block, [r, M]."""
        whole = tile_rV.shape[1] // self.width
        parts = [
            tile_rV[:, : whole * self.width].reshape(-1, whole, self.width),
            tile_rV[:, None, whole * self.width :],
        ]
        folded = [part.amax(-1) if largest else part.sum(-1) for part in parts if part.shape[-1]]
        return folded[0] if len(folded) == 1 else torch.cat(folded, -1)

    def look(self, blocks_nL: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of these blocks [n, L, b], and the number of each block's first token [n, L].

        What a block shares with its neighbour is -inf in the later one.
        """
        rows, vocabulary = self.logits_nV.shape
        first_nL = (blocks_nL * self.width).clamp_(max=vocabulary - self.width)
        windows = self.logits_nV.as_strided((max(self.logits_nV.numel() - self.width + 1, 0), self.width), (1, 1))
        offset_n1 = torch.arange(rows, device=blocks_nL.device).unsqueeze(-1) * vocabulary
        seen_nLb = windows.index_select(0, (offset_n1 + first_nL).flatten()).view(*blocks_nL.shape, self.width)
        if vocabulary % self.width:
            shared_nL1 = (blocks_nL * self.width - first_nL).unsqueeze(-1)
            seen_nLb.masked_fill_(torch.arange(self.width, device=seen_nLb.device) < shared_nL1, -torch.inf)
        return seen_nLb, first_nL


def _sample_group(logits_nV: Tensor, uniform_n: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    blocks = _Blocks.of(logits_nV, k)
    top_n1, large_nJ, large_ids_nJ, sums_nM = _candidates(blocks, k, temperature)
    heads_n1, total_n1, tau_n1 = _threshold(large_nJ, sums_nM.sum(-1, keepdim=True), k)
    index_nK = torch.arange(k, device=sums_nM.device) - heads_n1
    kept_nK = index_nK < 0
    large_nK, large_ids_nK = F.pad(large_nJ, (0, 1)), F.pad(large_ids_nJ, (0, 1))
    sums_nM.scatter_add_(-1, large_ids_nK // blocks.width, large_nK.masked_fill(kept_nK, 0.0))
    points_nK = (uniform_n.unsqueeze(-1) + index_nK).clamp_(min=0.0) * tau_n1
    drawn_nK, lost_nK = _locate(blocks, sums_nM, points_nK, _Scale(top_n1, tau_n1, temperature))
    ids_nK, order_nK = torch.where(kept_nK, large_ids_nK, drawn_nK).sort(-1)
    heads_nK = (large_nK / total_n1).masked_fill(~kept_nK, 0.0).gather(-1, order_nK)
    tau_n = (tau_n1 / total_n1).squeeze(-1)
    # Rounding may put a point beyond its block, or two points into one token.
    wrong_n = (lost_nK & ~kept_nK).any(-1) | (ids_nK.diff(dim=-1) == 0).any(-1)
    for rows in torch.split(wrong_n.nonzero().squeeze(-1), EXACT_ROWS):
        ids_nK[rows], heads_nK[rows], tau_n[rows] = _sample_exactly(logits_nV[rows], uniform_n[rows], k, temperature)
    return ids_nK, heads_nK, tau_n


def _sample_exactly(logits_nV: Tensor, uniform_n: Tensor, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The estimator as it is defined, in float64 and without blocks. What rounding still misses, the likeliest fill."""
    p_nV = (logits_nV.double() / temperature).softmax(-1)
    large_nJ, large_ids_nJ = p_nV.topk(k - 1)
    rest_n1 = p_nV.scatter(-1, large_ids_nJ, 0.0).sum(-1, keepdim=True)
    heads_n1, total_n1, tau_n1 = _threshold(large_nJ, rest_n1, k)
    index_nK = torch.arange(k, device=p_nV.device) - heads_n1
    head_nV = torch.zeros_like(p_nV, dtype=torch.bool).scatter_(-1, large_ids_nJ, index_nK[:, :-1] < 0)
    running_nV = p_nV.masked_fill(head_nV, 0.0).cumsum(-1)
    points_nK = (uniform_n.unsqueeze(-1) + index_nK).clamp_(min=0.0) * tau_n1
    drawn_nK = torch.searchsorted(running_nV, points_nK, right=True).clamp_(max=p_nV.shape[1] - 1)
    # A column that belongs to a head points at the likeliest token, which is one.
    drawn_nK = torch.where(index_nK < 0, p_nV.argmax(-1, keepdim=True), drawn_nK)
    chosen_nV = head_nV.scatter(-1, drawn_nK, True)
    ids_nK = torch.where(chosen_nV, 2.0 + p_nV, p_nV).topk(k).indices.sort(-1).values
    heads_nK = torch.where(head_nV, p_nV, 0.0).gather(-1, ids_nK)
    return ids_nK, heads_nK / total_n1, (tau_n1 / total_n1).squeeze(-1)


def _threshold(large_nJ: Tensor, rest_n1: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Number of heads, total mass, and tau, each [n, 1], from the J largest weights (descending) and all others' sum.

    With h heads tau is (mass of all others) / (K - h); h is the least for which no other exceeds it. Sums of what is
    left are never differences: they would cancel where the heads have nearly all.
    """
    left_nK = F.pad(large_nJ, (0, 1)).flip(-1).cumsum(-1).flip(-1) + rest_n1
    tau_nK = left_nK / torch.arange(k, 0, -1, device=left_nK.device)
    heads_n1 = (large_nJ > tau_nK[:, :-1]).cumprod(-1).sum(-1, keepdim=True)
    return heads_n1, left_nK[:, :1], tau_nK.gather(-1, heads_n1)


@dataclass(frozen=True, slots=True)
class _Scale:
    """How logits become weights: the row's largest, the threshold of heads, the temperature."""

    top_n1: Tensor
    tau_n1: Tensor
    temperature: float


def _candidates(blocks: _Blocks, k: int, temperature: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Largest logit [n, 1], the J largest weights z and their ids [n, J], the sums of all other z by block [n, M].

    The K largest tokens stand in the K blocks with the largest maxima. All sums are float64.
    """
    maxima_nM, sums_nM = _scan(blocks, temperature)
    top_n1 = maxima_nM.amax(-1, keepdim=True)
    leaders_nL = maxima_nM.topk(min(k, blocks.count), sorted=False).indices
    seen_nLb, first_nL = blocks.look(leaders_nL)
    z_nLb = _weights(seen_nLb, top_n1.unsqueeze(-1), temperature)
    large_nJ, where_nJ = z_nLb.flatten(1).topk(k - 1)
    ids_nJ = first_nL.gather(-1, where_nJ // blocks.width) + where_nJ % blocks.width
    z_nLb.flatten(1).scatter_(-1, where_nJ, 0.0)
    sums_nM = sums_nM.scatter_(-1, leaders_nL, z_nLb.sum(-1)).double()
    return top_n1, large_nJ.double(), ids_nJ, sums_nM


def _scan(blocks: _Blocks, temperature: float) -> tuple[Tensor, Tensor]:
    """Largest logit and sum of z of every block, each [n, M]: the only place that reads all logits."""
    maxima, sums = [], []
    work_rV = _workspace(blocks.logits_nV)
    for rows in _tiles(blocks.logits_nV):
        tile_rV = blocks.logits_nV[rows]
        maxima.append(blocks.fold(tile_rV, largest=True))
        z_rV = _weights(tile_rV, maxima[-1].amax(-1, keepdim=True), temperature, work_rV[: len(tile_rV)])
        sums.append(blocks.fold(z_rV, largest=False))
    maxima_nM = torch.cat(maxima)
    check_rows(maxima_nM.amax(-1).isfinite())
    return maxima_nM, torch.cat(sums)


def _locate(blocks: _Blocks, sums_nM: Tensor, points_nK: Tensor, scale: _Scale) -> tuple[Tensor, Tensor]:
    """Ids of the tokens in which the points of the running sum without heads lie [n, K], and whether one was lost."""
    running_nM = sums_nM.cumsum(-1)
    block_nK = torch.searchsorted(running_nM, points_nK, right=True).clamp_(max=blocks.count - 1)
    before_nK = F.pad(running_nM, (1, 0)).gather(-1, block_nK)
    seen_nKb, first_nK = blocks.look(block_nK)
    z_nKb = _weights(seen_nKb, scale.top_n1.unsqueeze(-1), scale.temperature)
    z_nKb.masked_fill_(z_nKb > scale.tau_n1.unsqueeze(-1), 0.0)
    inner_nK1 = (points_nK - before_nK).unsqueeze(-1)
    place_nK = torch.searchsorted(z_nKb.cumsum(-1, dtype=torch.float64), inner_nK1, right=True).squeeze(-1)
    lost_nK = place_nK == blocks.width
    return first_nK + place_nK.clamp_(max=blocks.width - 1), lost_nK


def _list_group(logits_nV: Tensor, k: int, temperatures: tuple[float, ...]) -> tuple[Tensor, Tensor, Tensor]:
    blocks = _Blocks.of(logits_nV, k)
    maxima_nM = blocks.fold(blocks.logits_nV, largest=True)
    top_n1 = maxima_nM.amax(-1, keepdim=True)
    check_rows(top_n1.isfinite())
    seen_nLb, first_nL = blocks.look(maxima_nM.topk(min(k, blocks.count), sorted=False).indices)
    values_nK, where_nK = seen_nLb.flatten(1).topk(k)
    ids_nK = first_nL.gather(-1, where_nK // blocks.width) + where_nK % blocks.width
    # Of tokens at -inf the blocks may offer one twice.
    for rows in torch.split((values_nK[:, -1] == -torch.inf).nonzero().squeeze(-1), EXACT_ROWS):
        ids_nK[rows] = blocks.logits_nV[rows].topk(k).indices
    ids_nK = ids_nK.sort(-1).values
    gaps_nK = blocks.logits_nV.gather(-1, ids_nK) - top_n1
    odds_nT = gaps_nK.new_empty((len(ids_nK), len(temperatures)), dtype=torch.float64)
    for place, temperature in enumerate(temperatures):
        listed_n = _weights(gaps_nK, torch.zeros_like(top_n1), temperature).double().sum(-1)
        odds_nT[:, place] = (_rest(blocks.logits_nV, top_n1, ids_nK, temperature).double() / listed_n).log()
    return ids_nK, gaps_nK, odds_nT


def _rest(logits_nV: Tensor, top_n1: Tensor, ids_nK: Tensor, temperature: float) -> Tensor:
    """Sum of z over the tokens that are not listed, [n]."""
    parts, work_rV = [], _workspace(logits_nV)
    for rows in _tiles(logits_nV):
        tile_rV = logits_nV[rows]
        z_rV = _weights(tile_rV, top_n1[rows], temperature, work_rV[: len(tile_rV)])
        parts.append(z_rV.scatter_(-1, ids_nK[rows], 0.0).sum(-1))
    return torch.cat(parts)


def _weights(logits: Tensor, top: Tensor, temperature: float, out: Tensor | None = None) -> Tensor:
    """The weights z, in `out` or a tensor of their own."""
    gaps = torch.sub(logits, top, out=out)
    return (gaps if temperature == 1 else gaps.div_(temperature)).exp_()


def _wide(logits_nV: Tensor) -> Tensor:
    """As float32 at least: exponentials of rounded logits are of no use."""
    return logits_nV.to(torch.promote_types(logits_nV.dtype, torch.float32))


def _tiles(logits_nV: Tensor) -> Iterator[slice]:
    """Rows to read at once; one empty tile where there are none."""
    return _runs(logits_nV, _tile_rows(logits_nV))


def _workspace(logits_nV: Tensor) -> Tensor:
    """Room for the largest tile, taken once: fresh pages for every tile would cost more than its arithmetic."""
    return logits_nV.new_empty(min(_tile_rows(logits_nV), len(logits_nV)), logits_nV.shape[1])


def _tile_rows(logits_nV: Tensor) -> int:
    row_bytes = logits_nV.shape[1] * logits_nV.element_size()
    return max(1, TILE_BYTES.get(logits_nV.device.type, TILE_BYTES["cuda"]) // row_bytes)


def _groups(logits_nV: Tensor, k: int) -> Iterator[slice]:
    """Rows to look into at once; fewer for large K, whose blocks would fill the memory."""
    most = GROUP_ROWS.get(logits_nV.device.type, GROUP_ROWS["cuda"])
    return _runs(logits_nV, max(1, min(most, most * 128 // k)))


def _runs(logits_nV: Tensor, rows: int) -> Iterator[slice]:
    return (slice(start, start + rows) for start in range(0, max(len(logits_nV), 1), rows))
