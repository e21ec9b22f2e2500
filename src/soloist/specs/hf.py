"""`ModelSpec` from the `config.json` of a Hugging Face checkpoint.

The meaning of each key is that of transformers 5.23. Whatever a config says is honoured or refused: a key that some
family reads and this one does not may only hold a neutral value. Older and newer spellings of a key are both read.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec

from soloist.errors import CheckpointError, ConfigurationError
from soloist.specs.hf_deepseek import DeepseekV2, DeepseekV3
from soloist.specs.hf_families import GptOss, Mixtral, Olmoe, Qwen2Moe, Qwen3Moe
from soloist.specs.hf_family import Family, Natural
from soloist.specs.model import ModelSpec
from soloist.specs.rope import convert, read_rope

FAMILIES: dict[str, type[Family]] = {
    "mixtral": Mixtral,
    "qwen2_moe": Qwen2Moe,
    "qwen3_moe": Qwen3Moe,
    "olmoe": Olmoe,
    "deepseek_v2": DeepseekV2,
    "deepseek_v3": DeepseekV3,
    "gpt_oss": GptOss,
}
# other spelling → ours
_SPELLINGS = {
    "num_local_experts": "num_experts",
    "n_routed_experts": "num_experts",
    "torch_dtype": "dtype",
    "experts_per_token": "num_experts_per_tok",
}
# keys that no family here may set
_NEVER = ("attn_logit_softcapping", "final_logit_softcapping", "logit_scale", "logits_scaling", "embedding_multiplier")
# names of ModelSpec's fields → keys of config.json, for messages
_KEYS = {
    "attention.kv_heads": "num_key_value_heads",
    "router.top_k": "num_experts_per_tok",
    "router.groups": "n_group",
    "router.kept_groups": "topk_group",
    "rope.width": "head_dim",
}


class _QuantisedWeights(msgspec.Struct):
    """Of compressed-tensors."""

    num_bits: int = 0
    type: str = "int"
    strategy: str | None = None
    symmetric: bool = True


_FP8 = ("fp8", "compressed-tensors")


class _QuantisedGroup(msgspec.Struct):
    weights: _QuantisedWeights = msgspec.field(default_factory=_QuantisedWeights)


class _Quantisation(msgspec.Struct):
    quant_method: str
    weight_block_size: list[int] | None = None
    fmt: str = "e4m3"
    activation_scheme: str = "dynamic"
    format: str | None = None
    config_groups: dict[str, _QuantisedGroup] = {}


class _Quantised(msgspec.Struct):
    quantization_config: _Quantisation


def read_config(source: Path | str | dict[str, Any], name: str | None = None) -> ModelSpec:
    """The spec of a checkpoint folder, or of a config given as a dict.

    End-of-sequence ids come from `generation_config.json` where it names them. Raises ConfigurationError for a config
    that is inconsistent, unknown or unsupported, CheckpointError for a folder without a readable one.
    """
    if isinstance(source, dict):
        return _spec(dict(source), name or str(source.get("_name_or_path") or source.get("model_type")), None)
    folder = Path(source)
    generation = folder / "generation_config.json"
    eos = read_json(generation).get("eos_token_id") if generation.exists() else None
    return _spec(read_json(folder / "config.json"), name or folder.resolve().name, eos)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError that names the file."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror}): give the folder of a checkpoint") from None
    except msgspec.DecodeError as error:
        raise CheckpointError(f"{path}: is not a JSON object ({error})") from None


def _spec(raw: dict[str, Any], name: str, eos: object) -> ModelSpec:
    kind = _family(raw.get("model_type"))
    raw = _one_spelling(raw)
    _refuse_unread(raw, kind)
    quantised = _quantisation(raw)
    config: Family = convert(raw, kind)
    for architecture in config.architectures:
        if not architecture.endswith("ForCausalLM"):
            raise ConfigurationError.of("architectures", architecture, "only causal language models are supported")
    rope = read_rope(raw | config.implied_rope(raw), kind.default_theta)
    try:
        spec = config.spec(name, rope, _eos_ids(raw.get("eos_token_id") if eos is None else eos))
        return msgspec.structs.replace(spec, fp8_experts=quantised in _FP8)
    except ConfigurationError as error:
        ours = str(error).split(" = ")[0]
        raise ConfigurationError(str(error).replace(ours, _KEYS.get(ours, ours), 1)) from None


def _family(model_type: object) -> type[Family]:
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigurationError.of("model_type", model_type, f"is not supported: {', '.join(FAMILIES)} are")
    return FAMILIES[model_type]


def _one_spelling(raw: dict[str, Any]) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for key, value in raw.items():
        ours = _SPELLINGS.get(key, key)
        if value is None:
            continue
        if known.setdefault(ours, value) != value:
            raise ConfigurationError.of(key, value, f"contradicts another spelling of it, {known[ours]!r}: keep one")
    return known


def _refuse_unread(raw: dict[str, Any], kind: type[Family]) -> None:
    """Refuse keys that change the computation elsewhere, and that this family does not know."""
    elsewhere = {name for other in FAMILIES.values() for name in other.__struct_fields__}
    for key in (elsewhere - set(kind.__struct_fields__)).union(_NEVER) & raw.keys():
        value = raw[key]
        is_neutral = not value or (key == "layer_types" and all(layer == "full_attention" for layer in value))
        if not is_neutral:
            raise ConfigurationError.of(key, value, f"is not supported for model_type {raw['model_type']}: remove it")


def _quantisation(raw: dict[str, Any]) -> str:
    """The method; "" where there is none. Refuses all but the released forms that the checkpoint reader knows: fp8 with
    a scale for 128×128 values or for a row, and gpt-oss's MXFP4."""
    if "quantization_config" not in raw:
        return ""
    given = convert({"quantization_config": raw["quantization_config"]}, _Quantised).quantization_config
    known = ("mxfp4",) if raw["model_type"] == "gpt_oss" else _FP8
    if given.quant_method not in known:
        remedy = "is not supported: fp8 in blocks of 128×128 or by row is, mxfp4 for gpt_oss; or take bfloat16 weights"
        raise ConfigurationError.of("quantization_config.quant_method", given.quant_method, remedy)
    if given.quant_method == "fp8":
        wanted = {"weight_block_size": [128, 128], "fmt": "e4m3", "activation_scheme": "dynamic"}
        _expect_quantised("quantization_config", given, wanted)
    if given.quant_method == "compressed-tensors":
        _expect_quantised("quantization_config", given, {"format": "float-quantized"})
        for name, group in given.config_groups.items():
            wanted = {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True}
            _expect_quantised(f"quantization_config.config_groups.{name}.weights", group.weights, wanted)
    return given.quant_method


def _expect_quantised(where: str, given: msgspec.Struct, wanted: dict[str, Any]) -> None:
    for key, value in wanted.items():
        if getattr(given, key) != value:
            remedy = f"only {value!r} is supported: take the bfloat16 weights"
            raise ConfigurationError.of(f"{where}.{key}", getattr(given, key), remedy)


def _eos_ids(value: object) -> tuple[int, ...]:
    try:
        ids = msgspec.convert(value, Natural | list[Natural] | None)
    except msgspec.ValidationError:
        raise ConfigurationError.of("eos_token_id", value, "must be a token id or a list of them") from None
    return () if ids is None else (ids,) if isinstance(ids, int) else tuple(ids)
