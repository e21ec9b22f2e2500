"""Other engines' launch commands as people have them, read into our vocabulary.

    vllm serve M …            python -m vllm.entrypoints.openai.api_server --model M …
    sglang serve …            python -m sglang.launch_server --model-path M …        docker run … vllm/vllm-openai …
    trtllm-serve M …          with what stands in the YAML file of its --config

each with what may stand before it (variables, `env`, `docker run …`) and behind it (pipes). What changes the speed and
is not modelled is noted, never dropped in silence.
"""

from __future__ import annotations

import json
import re
import shlex
from typing import Any, Literal, NamedTuple, cast

from soloist.errors import ConfigurationError
from soloist.specs.files import read_yaml
from soloist.specs.layout import Layout

Engine = Literal["vllm", "sglang", "tensorrt"]
Phase = Literal["", "prefill", "decode"]
Flags = dict[str, str]

VLLM_NAMES = {
    "tp": "tensor-parallel-size", "pp": "pipeline-parallel-size", "dp": "data-parallel-size", "q": "quantization",
    "tensor-parallel": "tensor-parallel-size", "ep": "enable-expert-parallel", "dcp": "decode-context-parallel-size",
}  # fmt: skip
SGLANG_NAMES = {
    "tp": "tp-size", "tensor-parallel-size": "tp-size", "pp": "pp-size", "pipeline-parallel-size": "pp-size",
    "dp": "dp-size", "data-parallel-size": "dp-size", "ep": "ep-size", "expert-parallel-size": "ep-size",
    "model": "model-path",
}  # fmt: skip
TENSORRT_NAMES = {
    "tensor-parallel-size": "tp-size", "pipeline-parallel-size": "pp-size", "moe-expert-parallel-size": "ep-size",
    "extra-llm-api-options": "config", "decoding-config": "speculative-config",
}  # fmt: skip
NAMES: dict[Engine, Flags] = {"vllm": VLLM_NAMES, "sglang": SGLANG_NAMES, "tensorrt": TENSORRT_NAMES}
ENDS = {"|", "||", "&", "&&", ";", ">", ">>", "2>", "2>&1", "&>"}  # words of a shell behind which the command is over
SWITCH = re.compile(r"(enable|disable|no|skip)-|(trust-remote-code|headless|enforce-eager|async-scheduling)$")
QUANTIZATION = {
    "fp8": "fp8", "w8a8-fp8": "fp8", "fbgemm-fp8": "fp8", "modelopt": "fp8", "modelopt-fp8": "fp8",
    "modelopt-fp4": "fp4", "mxfp4": "fp4", "nvfp4": "fp4",
}  # fmt: skip
UNMODELLED = {
    "speculative-config": "speculative decoding", "speculative-algorithm": "speculative decoding",
    "decode-context-parallel-size": "context parallelism", "prefill-context-parallel-size": "context parallelism",
    "attention-context-parallel-size": "context parallelism", "cpu-offload-gb": "weights in the host's memory",
    "enforce-eager": "steps without graphs", "disable-cuda-graph": "steps without graphs",
    "enable-single-batch-overlap": "overlap within one batch", "config": "flags in a file", "moe-dp-size": "its effect",
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
    kv: str  # data type of the KV cache, empty where it is the usual one
    phase: Phase  # the only one that this server has, if it has one only
    notes: tuple[str, ...]


def read_command(text: str) -> Command:
    """Raises ConfigurationError for what is no such command, and for flags that contradict each other."""
    try:
        words = shlex.split(re.sub(r"\\\r?\n", " ", text), comments=True)
    except ValueError as error:
        raise ConfigurationError.of("from", text[:60], f"cannot be read as a command: {error}") from error
    found = _started(words) or _in_container(words)
    if found is None:
        remedy = "give a `vllm serve …`, `python -m sglang.launch_server …` or `trtllm-serve …` command"
        raise ConfigurationError.of("from", text[:60], remedy)
    engine, start = found
    stop = next((at for at, word in enumerate(words) if at >= start and word in ENDS), len(words))
    positional, flags = _flags(words[start:stop], NAMES[engine])
    variables = dict(word.split("=", 1) for word in words[:start] if re.match(r"[A-Z_][A-Z0-9_]*=", word))
    if engine == "vllm":
        command = _vllm(positional, flags, variables)
    else:
        command = _sglang(positional, flags) if engine == "sglang" else _tensorrt(positional, flags)
    if not command.model:
        raise ConfigurationError.of("from", text[:60], "names no model; write it as for the engine itself")
    return command._replace(notes=(*command.notes, *_unmodelled(flags)))


def _unmodelled(flags: Flags) -> list[str]:
    """A degree of 1, and 0 of anything, change nothing."""
    given = [name for name, value in flags.items() if name in UNMODELLED and value not in ("0", "1")]
    found = [f"--{name} ({UNMODELLED[name]})" for name in given]
    return [f"Not modelled: {', '.join(found)}"] if found else []


def _started(words: list[str]) -> tuple[Engine, int] | None:
    """The engine, and where its arguments begin."""
    for at, word in enumerate(words):
        name, serves = word.rsplit("/", 1)[-1], words[at + 1 : at + 2] == ["serve"]
        if name == "vllm" and serves:
            return "vllm", at + 2
        if word.startswith("vllm.entrypoints") and word.endswith("api_server"):
            return "vllm", at + 1
        if name == "sglang" and serves:
            return "sglang", at + 2
        if re.fullmatch(r"sglang(_router)?\.launch_server", word):
            return "sglang", at + 1
        if name == "trtllm-serve":
            return "tensorrt", at + 1 + serves
    return None


def _in_container(words: list[str]) -> tuple[Engine, int] | None:
    """vLLM's image starts the server by itself."""
    return next((("vllm", at + 1) for at, word in enumerate(words) if "/vllm-openai" in word), None)


def _flags(words: list[str], names: dict[str, str]) -> tuple[list[str], Flags]:
    """Positional words, and flags by long name; a switch is `true`, and absent where it is told off."""
    positional: list[str] = []
    flags: Flags = {}
    queue = list(words)
    while queue:
        word = queue.pop(0)
        if not word.startswith("-"):
            positional.append(word)
            continue
        name, _, value = word.lstrip("-").partition("=")
        name = name.replace("_", "-")
        name = names.get(name, name)
        if not value and queue and _is_value(queue[0], name):
            value = queue.pop(0)
        flags[name] = value or "true"
    return positional, _told(flags)


def _told(flags: Flags) -> Flags:
    """Without what is told off, and what tells it."""
    off = {name for name, value in flags.items() if name.startswith("no-") or value.lower() == "false"}
    off |= {name.removeprefix("no-") for name in off}
    return {name: value for name, value in flags.items() if name not in off}


def _is_value(word: str, name: str) -> bool:
    """Whether it belongs to the flag before it: a switch is followed by nothing but true or false."""
    if SWITCH.match(name):
        return word.lower() in ("true", "false")
    return not word.startswith("-") or word[1:2].isdigit()


def _count(flags: Flags, name: str, default: int = 1) -> int:
    text = flags.get(name, str(default))
    if not text.isdigit() or (default and int(text) < 1):
        raise ConfigurationError.of(f"--{name}", text, "must be a positive number")
    return int(text)


def _vllm(positional: list[str], flags: Flags, variables: dict[str, str]) -> Command:
    tp, pp, dp = (_count(flags, f"{kind}-parallel-size") for kind in ("tensor", "pipeline", "data"))
    notes: list[str] = []
    if "enable-expert-parallel" in flags:
        layout = Layout(pp=pp, attn_tp=tp, ep=tp * dp)
    elif dp == 1:
        layout = Layout(pp=pp, tp=tp)
    else:
        layout = Layout(pp=pp, attn_tp=tp, ep=tp * dp)
        notes.append("vLLM cuts each expert over tp x dp ranks here; stated as whole experts on these ranks")
    backend = flags.get("all2all-backend", variables.get("VLLM_ALL2ALL_BACKEND", ""))
    overlaps = "deepep" in backend or "nixl" in backend
    if "enable-dbo" in flags and not overlaps:
        notes.append("--enable-dbo needs a DeepEP backend; without it nothing overlaps")
    redundant = _redundant(flags)
    if redundant and "enable-eplb" not in flags:
        notes.append(f"{redundant} redundant experts need --enable-eplb; counted as none")
        redundant = 0
    precision, kv = _precision(flags, notes)
    roles = {"kv_producer": "prefill", "kv_consumer": "decode"}
    role = next((phase for name, phase in roles.items() if name in flags.get("kv-transfer-config", "")), "")
    return Command(
        "vllm", (positional or [flags.get("model", "")])[0], layout, "enable-dbo" in flags and overlaps, redundant,
        _count(flags, "max-num-seqs", 0) * dp, precision, kv, _phase(role, notes), tuple(notes),
    )  # fmt: skip


def _redundant(flags: Flags) -> int:
    """As JSON, as a dotted flag, or as older releases spell it."""
    for name in ("eplb-config.num-redundant-experts", "num-redundant-experts"):
        if name in flags:
            return _count(flags, name, 0)
    text = flags.get("eplb-config", "{}")
    try:
        found = json.loads(text).get("num_redundant_experts", 0)
    except (ValueError, AttributeError):
        found = None
    if not isinstance(found, int) or found < 0:
        raise ConfigurationError.of("--eplb-config", text, "write JSON like '{\"num_redundant_experts\": 32}'")
    return found


def _sglang(positional: list[str], flags: Flags) -> Command:
    stage, pp = _count(flags, "tp-size"), _count(flags, "pp-size")
    has_dp = "enable-dp-attention" in flags or "attn-dp-size" in flags
    groups = _count(flags, "attn-dp-size", _count(flags, "dp-size")) if has_dp else 1
    older = "enable-deepep-moe" in flags or "enable-ep-moe" in flags  # released until mid 2025
    exchanges = older or flags.get("moe-a2a-backend", "none") != "none"
    ep = stage if exchanges else _count(flags, "ep-size")
    notes: list[str] = []
    layout = _layout(pp, 1 if has_dp else _count(flags, "dp-size"), stage, groups, ep, notes)
    precision, kv = _precision(flags, notes)
    return Command(
        "sglang", flags.get("model-path", (positional or [""])[0]), layout, "enable-two-batch-overlap" in flags,
        _count(flags, "ep-num-redundant-experts", 0), _count(flags, "max-running-requests", 0), precision, kv,
        _phase(flags.get("disaggregation-mode", ""), notes), tuple(notes),
    )  # fmt: skip


def _layout(pp: int, replicas: int, stage: int, groups: int, ep: int, notes: list[str]) -> Layout:
    """Of stages of `stage` GPUs with so many attention groups and expert groups."""
    if stage % ep or stage % groups:
        remedy = f"must be a multiple of ep {ep} and of the attention groups {groups}"
        raise ConfigurationError.of("--tp-size", stage, remedy)
    if stage // groups % (stage // ep):
        cut = f"experts cut over {stage // ep} ranks of several attention groups"
        notes.append(f"{cut}; stated as whole experts on them")
        ep = stage
    return Layout(pp=pp, dp=replicas, attn_tp=stage // groups, ep=ep, tp=stage // ep)


def _tensorrt(positional: list[str], flags: Flags) -> Command:
    """With enable_attention_dp every GPU is an attention group, and --max_batch_size counts for each."""
    notes: list[str] = []
    if file := flags.pop("config", ""):
        flags.update(_options(file, notes))
    stage = _count(flags, "tp-size")
    groups = stage if "enable-attention-dp" in flags else 1
    ep = _count(flags, "ep-size", max(1, stage // _count(flags, "moe-tensor-parallel-size", stage)))
    layout = _layout(_count(flags, "pp-size"), 1, stage, groups, ep, notes)
    precision, kv = _precision(flags, notes)
    sequences = _count(flags, "max-batch-size", 0) * groups
    return Command(
        "tensorrt", (positional or [""])[0], layout, False, 0, sequences, precision, kv, "", tuple(notes),
    )  # fmt: skip


def _options(file: str, notes: list[str]) -> Flags:
    """The options of a YAML file as flags, where it is at hand; a note where it is not."""
    try:
        found = read_yaml(file, "--config")
    except ConfigurationError:
        found = None
    if not isinstance(found, dict):
        notes.append(f"{file} cannot be read here, so its options are missing: counted without enable_attention_dp")
        return {}
    options = cast("dict[str, Any]", found)
    cache = options.get("kv_cache_config")
    given = {**options, "kv_cache_dtype": cast("dict[str, Any]", cache).get("dtype") if isinstance(cache, dict) else ""}
    named = {str(name).replace("_", "-"): str(value) for name, value in given.items()}
    return _told({TENSORRT_NAMES.get(name, name): value for name, value in named.items()})


def _precision(flags: Flags, notes: list[str]) -> tuple[str, str]:
    """Of the weights and of the KV cache, empty where the checkpoint decides."""
    name = flags.get("quantization", "").lower().replace("_", "-")
    if name and name not in QUANTIZATION:
        notes.append(f"--quantization {name} is not modelled; weights are counted as the checkpoint's own")
    return QUANTIZATION.get(name, ""), "fp8" if flags.get("kv-cache-dtype", "").startswith("fp8") else ""


def _phase(text: str, notes: list[str]) -> Phase:
    if text == "prefill":
        notes.append(
            "A server for prefill alone: tokens are those of prompts; sending their KV cache on is not counted"
        )
        return "prefill"
    if text == "decode":
        notes.append("A server for decode alone: prompts come with their KV cache, and cost no prefill here")
        return "decode"
    return ""
