"""How long the solver takes for a large model: 256 experts, top-8, 58 MoE layers, 128 GPUs on 16 nodes.

    OMP_NUM_THREADS=1 python examples/placement_at_scale.py --slots 2

The routing is made up: experts have log-normal popularity and belong to 32 topics; a token prefers the experts of its
own topic. Prints seconds of this process on its core, the objective beside its lower bound, and the baselines'.
"""

from __future__ import annotations

import argparse
import time

import numpy as np

from soloist.placement.layer import Target
from soloist.placement.solve import solve
from soloist.placement.trace import Array, RoutingTrace, Sample, TraceModel

TOPICS, POPULARITY, PREFERENCE = 32, 0.5, 1.5  # spread of the logarithm of popularity; bonus of the own topic


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in (("experts", 256), ("layers", 58), ("gpus", 128), ("slots", 2), ("tokens", 8192)):
        parser.add_argument(f"--{name}", type=int, default=value)
    a = parser.parse_args()
    trace = made_up(a.layers, a.experts, a.tokens, top_k=8)
    target = Target.of(a.experts, [gpu // 8 for gpu in range(a.gpus)], a.slots)
    start, start_cpu = time.perf_counter(), time.process_time()
    found = solve(trace, target)
    seconds, cpu = time.perf_counter() - start, time.process_time() - start_cpu
    print(
        f"{a.layers} layers of {a.experts} experts on {a.gpus} GPUs: {seconds:.1f} s, {cpu:.1f} s of them on the core"
    )
    for name, (_, value_L) in found.baselines.items():
        print(f"{name:12} {value_L.mean():8.4f}")
    print(f"{'solved':12} {found.value_L.mean():8.4f}   lower bound {found.bound_L.mean():.4f}, gap {found.gap:.1%}")


def made_up(layers: int, experts: int, tokens: int, top_k: int) -> RoutingTrace:
    """Routing with topics and unequal popularity."""
    rng = np.random.default_rng(0)
    ids_LTK = np.stack([choices(rng, experts, tokens, top_k) for _ in range(layers)])
    index_T = np.arange(tokens)
    none_T = np.zeros_like(index_T)
    model = TraceModel(
        name="made up", layers=layers, moe_layers=layers, experts=experts, top_k=top_k, d_model=1, vocab=1
    )
    return RoutingTrace.of_sample(model, Sample(ids_LTK, none_T, index_T, none_T, none_T, index_T))


def choices(rng: np.random.Generator, experts: int, tokens: int, top_k: int) -> Array:
    """`[T, K]`: top-k of popularity, a bonus for the token's topic, and Gumbel noise."""
    topic_E, topic_T = rng.integers(TOPICS, size=experts), rng.integers(TOPICS, size=tokens)
    score_TE = POPULARITY * rng.normal(size=experts) + rng.gumbel(size=(tokens, experts))
    score_TE += PREFERENCE * (topic_E == topic_T[:, None])
    return np.argpartition(-score_TE, top_k, axis=1)[:, :top_k]


if __name__ == "__main__":
    main()
