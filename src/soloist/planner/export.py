"""A plan for other engines: launch commands, the placement's file, the environment. What cannot be said there is said
here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import msgspec

from soloist.errors import ConfigurationError
from soloist.placement.formats import export_placement
from soloist.planner.engines import TENSORRT_FILE, TENSORRT_SPELLING, cannot, launch_flags, tensorrt_flags
from soloist.planner.environment import OBSOLETE, recommended, review
from soloist.planner.layer import Deployment
from soloist.planner.plan import Plan
from soloist.specs.presets import checkpoint_of

ENGINES = ("soloist", "vllm", "sglang", "tensorrt", "eplb")


def export(plan: Plan, engine: str, folder: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """Lines for a person; the placement's file is written to `folder` where the engine reads one.

    `environment`: what is set at present, whose obsolete variables are named. Raises ConfigurationError.
    """
    if engine not in ENGINES:
        raise ConfigurationError.of("--for", engine, f"choose one of {', '.join(ENGINES)}")
    replicas = sum(len(slots) for slots in plan.placement.slots[0]) - plan.model.experts if plan.model.experts else 0
    deployment = Deployment(
        model=plan.model, layout=plan.layout, precision=plan.precision,
        slots=max(len(slots) for slots in plan.placement.slots[0]) if replicas > 0 else 0,
    )  # fmt: skip
    yield from _command(plan, deployment, engine)
    yield from _placement(plan, engine, folder)
    yield "environment:"
    multi = recommended(plan.cluster, plan.layout.size, mpi=engine == "soloist")
    yield from (f"  export {one.name}={one.value}  # {one.why}" for one in multi)
    yield "set no more, where an old script still does:"
    yield from (f"  {name}: {why}" for name, why in OBSOLETE.items())
    yield from (f"set now: {line}" for line in review(environment))


def _command(plan: Plan, deployment: Deployment, engine: str) -> Iterator[str]:
    if plan.layout.dp > 1 and engine in ("vllm", "sglang", "tensorrt"):
        yield f"{plan.layout.dp} replicas are so many servers behind a load balancer; each of them:"
        plan = msgspec.structs.replace(plan, layout=msgspec.structs.replace(plan.layout, dp=1))
        deployment = msgspec.structs.replace(deployment, layout=plan.layout)
    name, layout = checkpoint_of(plan.model.name), plan.layout
    if engine == "soloist":
        served = name or f"{plan.model.name} --random-weights 1"
        settings = f"--set max_batch_tokens={plan.options.chunk_tokens}"
        if plan.options.mixed_graphs != "auto":
            settings += f" --set mixed_graphs={plan.options.mixed_graphs}"
        if plan.overlap:
            settings += f" --set overlap={plan.overlap}"
        yield f"command: soloist serve {served} --layout {layout} {settings}"
        yield "  (soloist launch writes it for torchrun, Slurm, MPI and Kubernetes)"
    elif name is None and engine != "eplb":
        yield f"no command: {plan.model.name} is a shape without a checkpoint"
    elif engine in ("vllm", "sglang"):
        flags = launch_flags(engine, deployment, bool(plan.halves))
        start = f"vllm serve {name}" if engine == "vllm" else f"python -m sglang.launch_server --model-path {name}"
        yield f"command: {start} {flags}" if flags else f"no command: {cannot(engine, deployment)}"
        if flags and "--attn-dp-size" in flags:
            yield f"  (older releases: --enable-dp-attention --dp-size {layout.attention_groups} for --attn-dp-size)"
    elif engine == "tensorrt":
        yield from _tensorrt(plan, name)


def _tensorrt(plan: Plan, checkpoint: str | None) -> Iterator[str]:
    layout = plan.layout
    flags = tensorrt_flags(layout)
    if flags is None:
        yield f"no command: attention is cut over all {layout.stage_ranks} GPUs or none, not {layout.attention_ranks}"
        return
    tokens = f"--max_num_tokens {plan.options.chunk_tokens}"
    yield f"command: trtllm-serve {checkpoint} {flags} {tokens} --config {TENSORRT_FILE}"
    yield f"  ({TENSORRT_SPELLING})"
    yield f"  {TENSORRT_FILE}: enable_attention_dp: {str(layout.attention_groups > 1).lower()}"
    yield f"  {TENSORRT_FILE}: moe_expert_parallel_size: {layout.ep}"
    yield f"  {TENSORRT_FILE}: moe_tensor_parallel_size: {layout.tp}"
    if plan.halves:
        yield "  not said there: two half batches that overlap; TensorRT-LLM has no such option"


def _placement(plan: Plan, engine: str, folder: Path) -> Iterator[str]:
    names = {"sglang": "placement.json", "tensorrt": "placement.yaml", "eplb": "placement.npz"}
    if engine == "vllm":
        yield "no placement: vLLM 0.33 has no released form of one; it starts linear and balances by itself"
    elif plan.layout.ep == 1 and engine != "soloist":
        yield "no placement: one group of GPUs holds all experts"
    elif engine == "soloist":
        plan.placement.save(folder / "placement.json")
        yield f"placement: {folder / 'placement.json'}, for --placement"
    else:
        path = folder / names[engine]
        notices = export_placement(plan.placement, plan.model, engine, path)
        flag = {"sglang": ", for --init-expert-location", "tensorrt": ", for moe_config.load_balancer"}.get(engine, "")
        yield f"placement: {path}{flag}"
        yield from (f"  {notice}" for notice in notices)
