"""Metrics in Prometheus' form: what clients see, what schedulers hold, how the experts are loaded.

Tokens are counted by plain integers as they pass; everything is put into Prometheus' form when it is asked for. The
labels are rank, leader, layer, link, reason and outcome, never two together, so that there are few series; `/details`
has more.
"""

from __future__ import annotations

import math
import time
from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from soloist.frontend.requests import Request, SequenceState
from soloist.frontend.wire import Delta
from soloist.server.desk import Desk
from soloist.server.slo import Slo
from soloist.server.watch import Watch, max_over_mean

RECENT = 512  # sequences whose times the dashboard shows
TTFT_S = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60)
GAP_S = (0.001, 0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)
WHOLE_S = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120, 300, 600)


class Histogram:
    """Counts in buckets; `observe` takes a fraction of a microsecond."""

    def __init__(self, bounds_s: Sequence[float]) -> None:
        self.bounds_s, self.counts, self.sum_s = tuple(bounds_s), [0] * (len(bounds_s) + 1), 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds_s, seconds)] += times
        self.sum_s += seconds * times

    def family(self, name: str, text: str) -> Metric:
        cumulated, buckets = 0, []
        for bound, count in zip((*map(str, self.bounds_s), "+Inf"), self.counts, strict=True):
            cumulated += count
            buckets.append((bound, cumulated))
        return HistogramMetricFamily(name, text, buckets=buckets, sum_value=self.sum_s)


class Tally:
    """What passes through the front end. Its `observe` is called with every delta."""

    def __init__(self, slo: Slo = Slo()) -> None:  # noqa: B008
        self.slo = slo
        self.in_time = 0  # complete sequences that met it
        self.prompt_tokens = self.generated = 0
        self.ended: Counter[str] = Counter()  # sequences by finish reason
        self.first, self.gap, self.whole = Histogram(TTFT_S), Histogram(GAP_S), Histogram(WHOLE_S)
        self.recent_first_s: deque[float] = deque(maxlen=RECENT)
        self.recent_tpot_s: deque[float] = deque(maxlen=RECENT)

    def observe(self, request: Request, sequence: SequenceState, delta: Delta, last_token_s: float) -> None:
        """`last_token_s`: of the sequence before this delta; NaN before its first token."""
        if delta.tokens:
            self.generated += len(delta.tokens)
            if math.isnan(last_token_s):
                self._begins(request, sequence)
            else:
                each_s = (sequence.last_token_s - last_token_s) / len(delta.tokens)
                self.gap.observe(each_s, len(delta.tokens))
        if delta.finish_reason:
            self._ends(request, sequence, delta.finish_reason)

    def _begins(self, request: Request, sequence: SequenceState) -> None:
        waited_s = sequence.first_token_s - request.arrival_s
        self.first.observe(waited_s)
        self.recent_first_s.append(waited_s)
        self.prompt_tokens += len(request.prompt)

    def _ends(self, request: Request, sequence: SequenceState, reason: str) -> None:
        self.ended[reason] += 1
        self.whole.observe(time.monotonic() - request.arrival_s)
        tpot_s = (sequence.last_token_s - sequence.first_token_s) / max(1, len(sequence.tokens) - 1)
        if len(sequence.tokens) > 1:
            self.recent_tpot_s.append(tpot_s)
        if reason in ("stop", "length"):
            self.in_time += self.slo.is_met(sequence.first_token_s - request.arrival_s, tpot_s)


class Metrics(Collector):
    """All families, collected when they are asked for."""

    def __init__(self, desk: Desk, tally: Tally, watch: Watch) -> None:
        self.desk, self.tally, self.watch = desk, tally, watch
        self._registry = CollectorRegistry()
        self._registry.register(self)

    def page(self) -> bytes:
        """What `/metrics` answers."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        yield from self._clients()
        yield from self._schedulers()
        yield from self._ranks()
        yield from self._layers()

    def _clients(self) -> Iterator[Metric]:
        tally, desk = self.tally, self.desk
        yield tally.first.family("time_to_first_token_seconds", "From a request's arrival to its first token.")
        yield tally.gap.family("inter_token_latency_seconds", "Between the tokens of a sequence.")
        yield tally.whole.family("request_latency_seconds", "From a request's arrival to the end of a sequence.")
        yield CounterMetricFamily("generation_tokens", "Tokens generated.", tally.generated)
        yield CounterMetricFamily(
            "prompt_tokens", "Prompt tokens of sequences with a first token.", tally.prompt_tokens
        )
        ended = CounterMetricFamily("sequences_ended", "Sequences by how they ended.", labels=["reason"])
        for reason in ("stop", "length", "abort", "error"):
            ended.add_metric([reason], tally.ended[reason])
        yield ended
        yield CounterMetricFamily("sequences_in_time", "Complete sequences that met the SLO.", tally.in_time)
        yield GaugeMetricFamily("requests_open", "Requests accepted and not yet answered.", desk.calls)
        yield GaugeMetricFamily("requests_waiting", "Requests without a first token.", desk.waiting)
        yield CounterMetricFamily("requests_accepted", "Requests accepted.", desk.accepted)
        calls = CounterMetricFamily("requests_ended", "Requests by how they ended.", labels=["outcome"])
        for outcome, count in desk.ended.items():
            calls.add_metric([outcome], count)
        yield calls
        yield CounterMetricFamily("requests_refused", "Requests refused because the queue was full.", desk.refused)

    def _schedulers(self) -> Iterator[Metric]:
        stats = {rank: report.stats for rank, report in self.desk.front.ranks.items() if report.stats}
        for name, text, field in (
            ("sequences_running", "Sequences with KV blocks.", "running"),
            ("sequences_waiting", "Sequences without KV blocks.", "waiting"),
            ("kv_blocks_used", "KV blocks that sequences hold.", "blocks_used"),
            ("kv_blocks", "KV blocks there are.", "blocks_total"),
        ):
            family = GaugeMetricFamily(name, text, labels=["leader"])
            for rank, one in stats.items():
                family.add_metric([str(rank)], getattr(one, field))
            yield family
        for name, text, field in (
            ("preemptions", "Sequences that lost their blocks to older ones.", "preemptions"),
            ("prefix_cache_hit_tokens", "Prompt tokens found in the cache.", "prefix_hits"),
            ("prefix_cache_query_tokens", "Prompt tokens looked up.", "prefix_queries"),
        ):
            yield CounterMetricFamily(name, text, sum(getattr(one, field) for one in stats.values()))

    def _ranks(self) -> Iterator[Metric]:
        totals = self.watch.totals
        for name, text, value in (
            ("rank_steps", "Steps of the rank.", lambda t: t.steps),
            ("rank_rows", "Rows that came for the rank's experts.", lambda t: t.rows),
            ("rank_waited_seconds", "In which the rank waited for peers.", lambda t: t.waited_s),
            (
                "rank_kept_waiting_seconds",
                "In which peers waited for the rank, all together.",
                lambda t: t.kept_waiting_s,
            ),
            (
                "rank_exchange_seconds",
                "Of exchange that nothing hid, waiting included.",
                lambda t: t.seconds["exchange"],
            ),
            ("rank_sent_bytes", "Sent to other ranks.", lambda t: sum(t.bytes_to.values())),
        ):
            family = CounterMetricFamily(name, text, labels=["rank"])
            for rank, total in totals.items():
                family.add_metric([str(rank)], value(total))
            yield family
        moved = CounterMetricFamily("exchange_bytes", "Sent inside nodes and across.", labels=["link"])
        for link, sent in zip(("inside", "across"), self.watch.bytes_moved(), strict=True):
            moved.add_metric([link], sent)
        yield moved

    def _layers(self) -> Iterator[Metric]:
        window = self.watch.window
        for name, text, loads in (
            ("expert_load_max_over_mean", "Most tokens of an expert over the mean, lately.", window.chosen),
            ("rank_load_max_over_mean", "Most rows of a rank over the mean, lately.", window.rows),
        ):
            family = GaugeMetricFamily(name, text, labels=["layer"])
            for layer, load in loads.items():
                family.add_metric([str(layer)], max_over_mean(load))
            yield family
