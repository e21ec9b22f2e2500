"""When each token came, and the time between tokens while all sequences decode."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from soloist.engine.llm import LLM
from soloist.errors import ConfigurationError, RequestError
from soloist.scheduling.request import SamplingParams


def token_times(llm: LLM, prompts: Sequence[Sequence[int]], output: int) -> list[list[float]]:
    """Seconds from the start to each token of each sequence. Raises RequestError for one that cannot be served."""
    params = SamplingParams(max_tokens=output, temperature=0.0, ignore_eos=True)
    times: defaultdict[int, list[float]] = defaultdict(list)
    begin = time.perf_counter()
    for part in llm.stream(prompts, params):
        if part.error:
            raise RequestError(part.error)
        times[part.prompt] += [time.perf_counter() - begin] * len(part.tokens)
    return list(times.values())


def steady_tpot_s(times: list[list[float]]) -> float:
    """Mean seconds between tokens while every sequence decodes: after the last first token, before the first end.

    Raises ConfigurationError where that window is empty.
    """
    begin_s, end_s = max(one[0] for one in times), min(one[-1] for one in times)
    inside = [[moment for moment in one if begin_s <= moment <= end_s] for one in times]
    gaps = [(one[-1] - one[0]) / (len(one) - 1) for one in inside if len(one) > 1]
    if not gaps:
        late = f"the last of {len(times)} sequences began {begin_s - end_s:.2f} s after the first had ended"
        raise ConfigurationError.of("tokens", max(map(len, times)), f"{late}; ask for more tokens or fewer streams")
    return float(np.mean(gaps))
