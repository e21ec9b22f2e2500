"""What a router does to a group of ranks, in expectation: copies sent, experts touched, the fullest rank.

Uniform routing has closed forms. Skewed routing is a power law over the experts' loads, the way aiconfigurator's tables
are made: loads are drawn from p(x) ~ x^-alpha on [1, 0.8 tokens] and scaled to tokens · top_k.
Traces replace both (`traced`).
"""

from __future__ import annotations

from functools import lru_cache
from math import exp, lgamma, log, sqrt
from statistics import NormalDist

import numpy as np

DRAWS, PACKED_DRAWS, REDRAWS = 64, 8, 50


@lru_cache(maxsize=4096)
def distinct(groups: int, experts: int, top_k: int) -> float:
    """Expected number of distinct groups among the top-k of a token, experts spread evenly over `groups`.

    groups · (1 − C(E − E/groups, k) / C(E, k)), by the logarithm of the gamma function for uneven E/groups.
    """
    return groups * _hit(experts, experts / groups, top_k) if groups > 1 else 1.0


@lru_cache(maxsize=1024)
def limited_distinct(nodes: int, experts: int, top_k: int, groups: int, kept: int) -> float:
    """The same when a token may use only `kept` of `groups` router groups, which lie on the nodes in order.

    A node holds j kept groups with hypergeometric probability, and is missed if no pick falls into these.
    """
    if groups <= kept or nodes <= 1:
        return distinct(nodes, experts, top_k)
    usable = experts * kept / groups
    if nodes >= groups:
        return nodes * kept / groups * _hit(usable, experts / nodes, top_k)
    here = groups // nodes
    ways = _log_choose(groups, kept)
    chances = (
        (j, exp(_log_choose(here, j) + _log_choose(groups - here, kept - j) - ways))
        for j in range(max(1, kept - groups + here), min(here, kept) + 1)
    )
    return nodes * sum(chance * _hit(usable, j * experts / groups, top_k) for j, chance in chances)


def _hit(usable: float, held: float, top_k: int) -> float:
    """Chance that at least one of `top_k` different picks among `usable` experts is one of `held`."""
    if usable - held < top_k:
        return 1.0
    return 1.0 - exp(_log_choose(usable - held, top_k) - _log_choose(usable, top_k))


def activated(slots: float, experts: int, top_k: int, tokens: float) -> float:
    """Expected experts among `slots` that at least one of `tokens` tokens chose: slots · (1 − (1 − k/E)^tokens)."""
    if top_k >= experts:
        return slots
    return slots * (1.0 - exp(tokens * log(1.0 - top_k / experts)))


@lru_cache(maxsize=65536)
def busiest(slots: int, active: float, ranks: int) -> float:
    """Expected maximum over `ranks` ranks of the experts that tokens chose among a rank's `slots`, `active` on average.

    Of two ranks each has what the other lacks. More of them are taken as independent, their slots, too: the sum over
    m of 1 − P(fewer than m) ^ ranks.
    """
    if ranks <= 1 or active <= 0 or active >= slots - 1e-6:
        return active
    if ranks == 2:
        below, part = int(2 * active), 2 * active % 1
        return (1 - part) * _fuller_half(slots, below) + (part * _fuller_half(slots, below + 1) if part else 0.0)
    share = active / slots
    chance, below, expected = (1 - share) ** slots, 0.0, 0.0
    for m in range(slots):
        below += chance
        expected += 1 - min(1.0, below) ** ranks
        chance *= (slots - m) / (m + 1) * share / (1 - share)
    return expected


def _fuller_half(slots: int, chosen: int) -> float:
    """Expected experts on that of two ranks of `slots` each which has more of `chosen` different ones."""
    ways = _log_choose(2 * slots, chosen)
    here = range(max(0, chosen - slots), min(slots, chosen) + 1)
    chances = (exp(_log_choose(slots, n) + _log_choose(slots, chosen - n) - ways) for n in here)
    return sum(chance * max(n, chosen - n) for n, chance in zip(here, chances, strict=True))


def straggler(ranks: int, pairs: float) -> float:
    """Expected max/mean of token-expert pairs over `ranks` ranks of uniform routing, `pairs` on each on average."""
    return 1.0 + highest(ranks) / sqrt(pairs) if ranks > 1 and pairs > 0 else 1.0


def highest(number: int) -> float:
    """Expected maximum of as many standard normal variates (Blom 1958)."""
    return NormalDist().inv_cdf((number - 0.375) / (number + 0.25)) if number > 1 else 0.0


@lru_cache(maxsize=256)
def power_law_loads(alpha: float, experts: int, tokens: int, top_k: int = 1) -> np.ndarray:
    """`[DRAWS, experts]` share of all token-expert pairs that each expert gets.

    No expert gets more than 1 / top_k, since a token chooses different ones; such draws are made again.
    """
    rng = np.random.default_rng(0)
    loads = _power_law(rng.random((DRAWS, experts)), alpha, tokens)
    for _ in range(REDRAWS):
        wrong = loads.max(axis=1) > 1 / top_k
        if not wrong.any():
            return loads
        loads[wrong] = _power_law(rng.random((int(wrong.sum()), experts)), alpha, tokens)
    return np.minimum(loads, 1 / top_k)


def _power_law(u: np.ndarray, alpha: float, tokens: int) -> np.ndarray:
    most, power = 0.8 * max(tokens, 2), 1.0 - alpha
    drawn = most**u if abs(power) < 1e-6 else ((most**power - 1.0) * u + 1.0) ** (1.0 / power)
    return drawn / drawn.sum(axis=1, keepdims=True)


@lru_cache(maxsize=65536)
def imbalance(alpha: float, experts: int, ranks: int, tokens: int, replicas: int = 0, top_k: int = 1) -> float:
    """Expected max/mean of the ranks' loads under a power law, experts dealt to ranks in order of drawing.

    `replicas` more slots than experts go to the hottest experts (water-filling), slots are packed by load.
    """
    if alpha <= 0 or ranks <= 1:
        return 1.0
    loads = power_law_loads(alpha, experts, tokens, top_k)
    if replicas or ranks > experts:
        slots = max(experts + replicas, ranks)
        return float(np.mean([_packed(row, ranks, slots) for row in loads[:PACKED_DRAWS]]))
    edges = np.arange(ranks) * experts // ranks
    return float(np.mean(np.add.reduceat(loads, edges, axis=1).max(axis=1)) * ranks)


def _packed(loads: np.ndarray, ranks: int, slots: int) -> float:
    """Max/mean after replicating the hottest experts and packing slots: heaviest first, to and fro over the ranks."""
    counts = _water_filled(loads, slots)
    each = -(-slots // ranks)
    shares = np.zeros(ranks * each)
    filled = np.sort(np.repeat(loads / counts, counts))[::-1]
    shares[: len(filled)] = filled
    rounds = shares.reshape(each, ranks)
    rounds[1::2] = rounds[1::2, ::-1].copy()
    return float(rounds.sum(axis=0).max() * ranks)


def _water_filled(loads: np.ndarray, slots: int) -> np.ndarray:
    """Replicas of each expert so that the fullest replica is as small as `slots` slots allow."""
    low, high = 0.0, float(loads.max())
    for _ in range(40):
        level = (low + high) / 2
        low, high = (level, high) if np.ceil(loads / level).sum() > slots else (low, level)
    return np.maximum(1, np.ceil(loads / high)).astype(int)


def _log_choose(n: float, k: int) -> float:
    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)
