"""Requests through a deployment, in virtual time.

    arrive ─► the group with the least to do ─► turn ─► turn ─► … ─► last token
                 ▲                               │
                 └──────── lost with its GPU ────┘

Everything that happens is an event of the clock: an arrival, a turn of a replica, a loss, a change of routing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

from soloist.errors import ConfigurationError, RequestError
from soloist.scheduling.config import SchedulerConfig
from soloist.simulator.arrivals import Arrivals
from soloist.simulator.clock import Clock
from soloist.simulator.cost import CostModel
from soloist.simulator.ledger import Ledger, StepLog
from soloist.simulator.losses import Loss
from soloist.simulator.replica import Landed, Launched, Replica, Submission
from soloist.simulator.routing import Routing
from soloist.simulator.steady import TOKEN
from soloist.specs.layout import Layout

ARRIVAL, LOSS, TURN = range(3)  # order of what happens at one moment
PROMPT_STRIDE = 1 << 32  # between the first ids of two prompts, which share no token but their common prefix
Observer = Callable[[int, Launched], None]


class Simulation:
    """One run. `observe(replica, step)` sees every step that starts."""

    def __init__(
        self,
        layout: Layout,
        sizes: SchedulerConfig,
        cost: CostModel,
        requests: Arrivals,
        *,
        losses: Iterable[Loss] = (),
        routing: Routing | None = None,
        skip: bool = True,
        observe: Observer | None = None,
    ) -> None:
        self.layout, self.sizes, self.requests = layout, sizes, requests
        self.routing, self.observe = routing, observe
        groups = layout.attention_groups
        self.replicas = [Replica(sizes, groups, layout.pp, cost, skip) for _ in range(layout.dp)]
        self.load = np.zeros((layout.dp, groups))  # tokens that each group still has to do; infinite: lost
        self.clock = Clock()
        self.ledger, self.steps = Ledger(requests), StepLog()
        self._turn_s: list[float | None] = [None] * layout.dp  # when each replica's next turn is due
        self._left = len(requests)  # requests that have not ended
        self._next = 0  # request to arrive
        for loss in losses:
            self.clock.at(loss.at_s, partial(self._lose, loss, loss.groups(layout)), LOSS)

    def run(self) -> Simulation:
        """Until every request has ended. Returns itself."""
        for _ in range(self.requests.in_flight or 1):
            self._expect()
        if self.routing:
            self._reroute()
        self.clock.run()
        assert not self._left, "a request was lost"
        return self

    @property
    def end_s(self) -> float:
        """When the last step ended."""
        return float(self.steps["end_s"].max(initial=0.0))

    # -- arrivals ---------------------------------------------------------------------------------------------------
    def _expect(self) -> None:
        """Let the next request arrive: at its time, or at once in a closed loop."""
        if self._next < len(self.requests):
            self.clock.at(float(self.requests.times_s[self._next]), partial(self._arrive, self._next), ARRIVAL)
            self._next += 1

    def _arrive(self, request: int) -> None:
        self.ledger.arrival_s[request] = self.clock.now
        self._submit(request)
        if not self.requests.in_flight:
            self._expect()

    def _submit(self, request: int) -> None:
        """Hand a request, or what is left of it, to the group with the least to do, as the front end does."""
        output = max(1, int(self.requests.outputs[request] - self.ledger.done[request]))  # what prefill ends with
        prompt = self._prompt(request)
        replica, group = divmod(int(np.argmin(self.load)), self.layout.attention_groups)
        try:
            self.replicas[replica].submit(group, Submission(request, prompt, output))
        except RequestError as error:
            self.ledger.refused[request] = str(error)
            self._end()
            return
        self.ledger.submissions[request] += 1
        self.load[replica, group] += len(prompt) + output
        if self._turn_s[replica] is None:
            self._set_turn(replica)

    def _prompt(self, request: int) -> list[int]:
        """Ids of the shared prefix, of the request's own prompt, and of the tokens that it got before a loss."""
        count = int(self.requests.prompts[request] + self.ledger.done[request])
        if not self.sizes.prefix_caching:
            return [TOKEN] * count
        shared, own = int(self.requests.shared[request]), PROMPT_STRIDE * (request + 1)
        return [*range(shared), *range(own + shared, own + count)]

    def _end(self) -> None:
        self._left -= 1
        if self.requests.in_flight:
            self._expect()

    # -- turns ------------------------------------------------------------------------------------------------------
    def _set_turn(self, replica: int) -> None:
        due = self.replicas[replica].next_turn_s
        self._turn_s[replica] = due = None if due is None else max(due, self.clock.now)
        if due is not None:
            self.clock.at(due, partial(self._turn, replica, due), TURN)

    def _turn(self, replica: int, due: float) -> None:
        if self._turn_s[replica] != due:  # put off by a loss
            return
        landed, launched = self.replicas[replica].turn(self.clock.now)
        if landed:
            self._take(replica, landed)
        for step in launched:
            self.steps.add(replica, step)
            if self.observe:
                self.observe(replica, step)
        self._set_turn(replica)

    def _take(self, replica: int, landed: Landed) -> None:
        """Book what a step gave its sequences."""
        self.load[replica] -= landed.tokens
        now = self.clock.now
        for group, output in landed.outputs:
            request = output.sequence
            if np.isnan(self.ledger.first_s[request]):
                self.ledger.first_s[request] = now
            if output.finish_reason:
                self.ledger.finish_s[request] = now
                self.load[replica, group] -= self.requests.prompts[request] + self.ledger.done[request]
                self._end()

    # -- losses and routing -----------------------------------------------------------------------------------------
    def _lose(self, loss: Loss, lost: dict[int, set[int]]) -> None:
        """Resubmit what was running on lost GPUs, with the tokens that it has."""
        if not self._left:
            return
        for number, groups in lost.items():
            replica = self.replicas[number]
            if self.layout.attention_groups == 1:
                orphans = replica.restart(self.clock.now, loss.recovery_s)
                self._withdraw(number)
            else:
                orphans = replica.lose(groups - replica.lost, self.clock.now, loss.recovery_s)
                self.load[number, list(groups)] = np.inf
            self._check_survivors(loss)
            for request, tokens in sorted(orphans.items()):
                self.ledger.done[request] += tokens
                self._submit(request)
            self._set_turn(number)

    def _withdraw(self, number: int) -> None:
        """Give a restarting replica nothing to do before it is back, if there are others."""
        self.load[number] = np.inf
        if np.isinf(self.load).all():
            self.load[number] = 0
        self.clock.at(self.replicas[number].resume_s, partial(self._return, number), LOSS)

    def _return(self, number: int) -> None:
        if np.isinf(self.load[number]).all() and self.clock.now >= self.replicas[number].resume_s:
            self.load[number] = 0

    def _check_survivors(self, loss: Loss) -> None:
        if np.isinf(self.load).all():
            raise ConfigurationError.of("lose", str(loss), "no attention group is left; lose fewer GPUs")

    def _reroute(self) -> None:
        """Let the routing drift, and the balancer act, for as long as there are requests."""
        assert self.routing is not None
        if not self._left:
            return
        stall_s = self.routing.advance(self.clock.now)
        for number, replica in enumerate(self.replicas):
            replica.imbalance = self.routing.imbalance
            if stall_s:
                replica.pause(self.clock.now, stall_s)
                self._set_turn(number)
        self.clock.at(self.clock.now + self.routing.interval_s, self._reroute, LOSS)
