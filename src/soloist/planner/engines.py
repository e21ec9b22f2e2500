"""A deployment as flags of other engines. What an engine cannot express is said in words, never dropped."""

from __future__ import annotations

import json

from soloist.planner.engine_commands import Engine
from soloist.planner.layer import Deployment
from soloist.specs.layout import Layout

TENSORRT_FILE = "options.yaml"
TENSORRT_SPELLING = "--config is spelled --extra_llm_api_options in older releases"
OVERLAP_FLAGS: dict[Engine, str] = {"vllm": "--enable-dbo", "sglang": "--enable-two-batch-overlap"}


def launch_flags(engine: Engine, deployment: Deployment, is_overlapped: bool) -> str | None:
    """A deployment as the engine's flags; None where it cannot express the layout."""
    layout = deployment.layout
    if layout.dp > 1 or cuts_heads(deployment):
        return None
    if engine == "tensorrt":
        flags = None if deployment.replicas or is_overlapped else tensorrt_flags(layout)
        return f"{flags} --config {TENSORRT_FILE}" if flags and layout.attention_groups > 1 else flags
    flags = _vllm_flags(layout, deployment.replicas) if engine == "vllm" else _sglang_flags(layout, deployment.replicas)
    if flags is None or not is_overlapped:
        return flags
    return f"{flags} {OVERLAP_FLAGS[engine]}"


def cannot(engine: Engine, deployment: Deployment) -> str:
    """Why the engine cannot express it."""
    if deployment.layout.dp > 1:
        return f"{deployment.layout.dp} replicas are {deployment.layout.dp} servers behind a load balancer"
    layout, attention = deployment.layout, deployment.model.attention
    if cuts_heads(deployment):
        return f"attention over {layout.attention_ranks} GPUs would cut some of {attention.heads} heads"
    groups = f"{layout.ep} expert groups of {layout.tp} GPUs with attention over {layout.attention_ranks}"
    return f"{engine} has no flags for {groups}"


def cuts_heads(deployment: Deployment) -> bool:
    """Both engines want equal shares: of heads, and of KV heads, which they repeat where there are fewer."""
    ranks, attention = deployment.layout.attention_ranks, deployment.model.attention
    few = min(ranks, attention.kv_heads)
    return attention.heads % ranks > 0 or attention.kv_heads % few > 0 or ranks % few > 0


def tensorrt_flags(layout: Layout) -> str | None:
    """Attention is cut over all GPUs of a stage or none; which of both stands in a file (`TENSORRT_FILE`)."""
    if layout.attention_ranks not in (1, layout.stage_ranks):
        return None
    return f"--tp_size {layout.stage_ranks} --ep_size {layout.ep} --pp_size {layout.pp}"


def _vllm_flags(layout: Layout, replicas: int) -> str | None:
    pipeline = f" -pp {layout.pp}" if layout.pp > 1 else ""
    if layout.ep == 1:
        return f"-tp {layout.tp}{pipeline}" if layout.attention_ranks == layout.tp else None
    if layout.tp > 1:
        return None
    flags = f"-tp {layout.attention_ranks} -dp {layout.attention_groups}{pipeline} --enable-expert-parallel"
    if layout.attention_groups > 1:
        flags += " --all2all-backend deepep_low_latency"
    if replicas:
        flags += f" --enable-eplb --eplb-config '{json.dumps({'num_redundant_experts': replicas})}'"
    return flags


def _sglang_flags(layout: Layout, replicas: int) -> str | None:
    flags = f"--tp-size {layout.stage_ranks}" + (f" --pp-size {layout.pp}" if layout.pp > 1 else "")
    if layout.attention_groups > 1:
        flags += f" --attn-dp-size {layout.attention_groups}"
    if layout.ep > 1 and layout.tp == 1:
        flags += " --moe-a2a-backend deepep" if layout.attention_groups > 1 else f" --ep-size {layout.ep}"
    elif layout.ep > 1:
        flags += f" --ep-size {layout.ep}"
    return flags + (f" --ep-num-redundant-experts {replicas}" if replicas else "")
