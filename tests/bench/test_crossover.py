"""Which form is said to be the fastest, and where forms cross."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from soloist.bench import crossover
from soloist.bench.crossover import ByForm, crossing_of_shares, crossing_of_tokens
from soloist.bench.exchange import Measured
from soloist.bench.floors import Machine
from soloist.bench.load import Load
from soloist.bench.report import Ceilings
from soloist.bench.trace import Trace
from soloist.kernels.language import AVAILABLE, INTERPRETED
from soloist.probes.gpus import Bench, OneGpu
from soloist.transport.symmetric import Watch, windows_in_process


def found(tokens: int = 4096, top_k: int = 8, **micro: float) -> ByForm:
    return ByForm(Load(tokens, 64, top_k, 64), "latency", {name: 1e-6 * each for name, each in micro.items()})


def test_where_forms_cross() -> None:
    by_tokens = [found(128, latency=10, push=20), found(512, latency=30, push=33), found(1024, latency=60, push=50)]
    by_share = [found(top_k=1, push=10, copy=20), found(top_k=2, push=20, copy=19), found(top_k=3, push=20, copy=21)]
    assert crossing_of_tokens(by_tokens) == "the latency form is the fastest up to 512 tokens a rank"
    assert crossing_of_tokens(by_tokens[2:]) == "the latency form is the fastest nowhere from 1024 tokens a rank on"
    assert crossing_of_shares(by_share, 2) == "push is faster than copy up to 1 choices among 2 groups"


def test_what_is_said_of_a_form() -> None:
    one = found(latency=10, push=15)
    assert (one.said_of("latency"), one.said_of("push")) == ("the fastest, chosen", "1.50 x the fastest")


@pytest.mark.skipif(not (AVAILABLE and INTERPRETED), reason="needs Triton and TRITON_INTERPRET=1")
def test_every_load_and_form_is_checked_and_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Times aside, in the interpreter, on the only rank of a world."""

    def seconds(bench: OneGpu, *works: Callable[[], object], **settings: float) -> list[float]:
        return [float(work() is None) for work in works]

    cpu, small = torch.device("cpu"), Load(2, 16, 1, 2, dtype=torch.float32)
    group = SimpleNamespace(window=lambda held: windows_in_process(1, held, cpu)[0])
    bench = OneGpu(0, 1, cpu, Watch(0, (0,), cpu, 1.0))
    monkeypatch.setattr(bench, "group", group, raising=False)
    monkeypatch.setattr(OneGpu, "seconds", seconds)
    monkeypatch.setattr("soloist.bench.exchange_run.captured", lambda work, warm_up: work)
    forms = {name: replace(form, programs=2, block=16, weigh_block=16) for name, form in crossover.FORMS.items()}
    small_loads = {
        "FORMS": forms,
        "TOKENS": (2,),
        "MANY": 2,
        "TOP_K": (2,),
        "BY_TOKENS": (small,),
        "BY_SHARE": small,
    }
    for name, value in small_loads.items():
        monkeypatch.setattr(crossover, name, value)
    measured = Measured(cast(Bench, bench), cast(Trace, None), Machine("machine", Ceilings(link=1e9)))
    points = list(crossover.crossovers(cast(Bench, bench), measured.point))
    assert [(point.shape["T"], point.shape["K"], point.variant) for point in points] == [
        *[(2, 1, form) for form in ("latency", "push", "copy")],
        *[(2, 2, form) for form in ("push", "copy")],
    ]
    assert len([point for point in points if "the fastest" in point.bound_by]) == 5
    assert "choices among 1 groups" in capsys.readouterr().out
