"""vLLM's and SGLang's launch commands, read into our vocabulary and written from it.

What an engine cannot express is said in words, never dropped.
"""

from __future__ import annotations

import json
import shlex
from typing import Literal, NamedTuple

from soloist.errors import ConfigurationError
from soloist.planner.layer import Deployment
from soloist.specs.layout import Layout

Engine = Literal["vllm", "sglang"]
SHORT = {
    "tp": "tensor-parallel-size", "pp": "pipeline-parallel-size", "dp": "data-parallel-size", "q": "quantization",
    "tensor-parallel": "tensor-parallel-size", "ep": "enable-expert-parallel",
}  # fmt: skip
SGLANG_NAMES = {
    "tp": "tp-size", "tensor-parallel-size": "tp-size", "pipeline-parallel-size": "pp-size",
    "data-parallel-size": "dp-size", "ep": "ep-size", "expert-parallel-size": "ep-size", "model": "model-path",
}  # fmt: skip


class Command(NamedTuple):
    """A launch command in our words. `redundant`: expert slots beyond one for each expert, over all groups."""

    engine: Engine
    model: str
    layout: Layout
    is_overlapped: bool
    redundant: int
    sequences: int  # most in flight in the whole deployment, 0 where not stated
    precision: str  # empty where the checkpoint decides
    notes: tuple[str, ...]


def read_command(text: str) -> Command:
    """`vllm serve M …` or `python -m sglang.launch_server …`. Raises ConfigurationError for anything else."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise ConfigurationError.of("from", text[:60], f"cannot be read as a command: {error}") from error
    if "vllm" in words[:1] and words[1:2] == ["serve"]:
        return _vllm(*_flags(words[2:], SHORT))
    if any(word.startswith("sglang") for word in words):
        start = next(i for i, word in enumerate(words) if word.startswith("sglang"))
        return _sglang(*_flags(words[start + 1 :], SGLANG_NAMES))
    raise ConfigurationError.of(
        "from", text[:60], "give a `vllm serve …` or `python -m sglang.launch_server …` command"
    )


def _flags(words: list[str], names: dict[str, str]) -> tuple[list[str], dict[str, str]]:
    """Positional words, and flags by long name; a flag without a value is `true`."""
    positional: list[str] = []
    flags: dict[str, str] = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("-"):
            positional.append(word)
            continue
        name, _, value = word.lstrip("-").replace("_", "-").partition("=")
        if not value and queue and not queue[0].startswith("-"):
            value = queue.pop(0)
        flags[names.get(name, name)] = value or "true"
    return positional, flags


def _count(flags: dict[str, str], name: str, default: int = 1) -> int:
    text = flags.get(name, str(default))
    if not text.isdigit() or (default and int(text) < 1):
        raise ConfigurationError.of(f"--{name}", text, "must be a positive number")
    return int(text)


def _vllm(positional: list[str], flags: dict[str, str]) -> Command:
    tp, pp, dp = (_count(flags, f"{kind}-parallel-size") for kind in ("tensor", "pipeline", "data"))
    notes: list[str] = []
    if "enable-expert-parallel" in flags:
        layout = Layout(pp=pp, attn_tp=tp, ep=tp * dp)
    elif dp == 1:
        layout = Layout(pp=pp, tp=tp)
    else:
        layout = Layout(pp=pp, attn_tp=tp, ep=tp * dp)
        notes.append("vLLM cuts each expert over tp x dp ranks here; stated as whole experts on these ranks")
    if "enable-dbo" in flags and "deepep" not in flags.get("all2all-backend", ""):
        notes.append("--enable-dbo needs a DeepEP backend; without it nothing overlaps")
    redundant = _redundant(flags.get("eplb-config", "{}"))
    return Command(
        "vllm", (positional or [flags.get("model", "")])[0], layout,
        "enable-dbo" in flags and "deepep" in flags.get("all2all-backend", ""), redundant,
        _count(flags, "max-num-seqs", 0) * dp, flags.get("quantization", ""), tuple(notes),
    )  # fmt: skip


def _redundant(text: str) -> int:
    try:
        found = json.loads(text).get("num_redundant_experts", 0)
    except (ValueError, AttributeError):
        found = None
    if not isinstance(found, int) or found < 0:
        raise ConfigurationError.of("--eplb-config", text, "write JSON like '{\"num_redundant_experts\": 32}'")
    return found


def _sglang(positional: list[str], flags: dict[str, str]) -> Command:
    tp, pp = _count(flags, "tp-size"), _count(flags, "pp-size")
    stage = tp
    has_dp = "enable-dp-attention" in flags or "attn-dp-size" in flags
    groups = _count(flags, "attn-dp-size", _count(flags, "dp-size")) if has_dp else 1
    exchanges = flags.get("moe-a2a-backend", "none") != "none"
    ep = stage if exchanges else _count(flags, "ep-size")
    notes: list[str] = []
    if stage % ep or stage % groups:
        raise ConfigurationError.of(
            "--tp-size", stage, f"must be a multiple of ep {ep} and of the attention groups {groups}"
        )
    if stage // groups % (stage // ep):
        notes.append(
            f"experts cut over {stage // ep} ranks of several attention groups; stated as whole experts on them"
        )
        ep = stage
    replicas = 1 if has_dp else _count(flags, "dp-size")
    layout = Layout(pp=pp, dp=replicas, attn_tp=stage // groups, ep=ep, tp=stage // ep)
    return Command(
        "sglang", flags.get("model-path", (positional or [""])[0]), layout, "enable-two-batch-overlap" in flags,
        _count(flags, "ep-num-redundant-experts", 0), _count(flags, "max-running-requests", 0),
        flags.get("quantization", ""), tuple(notes),
    )  # fmt: skip


def launch_flags(engine: Engine, deployment: Deployment, is_overlapped: bool) -> str | None:
    """A deployment as the engine's flags; None where it cannot express the layout."""
    layout = deployment.layout
    if layout.dp > 1:
        return None
    flags = _vllm_flags(layout, deployment.replicas) if engine == "vllm" else _sglang_flags(layout, deployment.replicas)
    if flags is None or not is_overlapped:
        return flags
    return flags + (" --enable-dbo" if engine == "vllm" else " --enable-two-batch-overlap")


def cannot(engine: Engine, deployment: Deployment) -> str:
    """Why the engine cannot express it."""
    if deployment.layout.dp > 1:
        return f"{deployment.layout.dp} replicas are {deployment.layout.dp} servers behind a load balancer"
    layout = deployment.layout
    groups = f"{layout.ep} expert groups of {layout.tp} GPUs with attention over {layout.attention_ranks}"
    return f"{engine} has no flags for {groups}"


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
