"""Rotary position embedding as `config.json` describes it.

Formulas: YaRN (arXiv:2309.00071), Llama 3.1's frequency bands, and DeepSeek's mscale, which both scales cos and sin and
multiplies the softmax scale. Defaults are those of transformers 5.23 (`modeling_rope_utils.py`).
"""

from __future__ import annotations

import math
from typing import Any, Literal, TypeVar

import msgspec
from msgspec.structs import replace

from soloist.errors import ConfigurationError
from soloist.specs.model import RopeSpec

_YARN = {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"}
_KEYS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor", "original_max_position_embeddings"} | _YARN,
}


Read = TypeVar("Read")


class RopeParameters(msgspec.Struct, kw_only=True):
    """The keys of `rope_parameters`, or of `rope_scaling` in older configs."""

    rope_type: Literal["default", "linear", "llama3", "yarn"] = "default"
    rope_theta: float | None = None
    partial_rotary_factor: float | None = None
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None

    def spec(self, width: int, interleaved: bool = False) -> RopeSpec:
        """The rotation of heads with `width` rotated elements."""
        assert self.rope_theta is not None
        spec = RopeSpec(
            kind=self.rope_type,
            theta=self.rope_theta,
            width=width,
            interleaved=interleaved,
            factor=self.factor or 1.0,
            original_max_positions=self.original_max_position_embeddings or 0,
        )
        if self.rope_type == "llama3":
            return replace(spec, low_freq_factor=self.low_freq_factor, high_freq_factor=self.high_freq_factor)
        if self.rope_type == "yarn":
            return replace(
                spec,
                beta_fast=self.beta_fast or spec.beta_fast,
                beta_slow=self.beta_slow or spec.beta_slow,
                truncate=self.truncate is not False,
                attention_factor=self._attention_factor(spec.factor),
            )
        return spec

    def softmax_factor(self) -> float:
        """What DeepSeek multiplies the softmax scale by: the square of mscale_all_dim's mscale."""
        return _mscale(self.factor or 1.0, self.mscale_all_dim) ** 2 if self.mscale_all_dim else 1.0

    def _attention_factor(self, factor: float) -> float:
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _mscale(factor, self.mscale) / _mscale(factor, self.mscale_all_dim)
        return _mscale(factor, 1.0)


def read_rope(config: dict[str, Any], default_theta: float) -> RopeParameters:
    """Rope parameters of a config in the new spelling (`rope_parameters`) or the old (`rope_theta`, `rope_scaling`)."""
    key, given = _given(config)
    if any(isinstance(value, dict) for value in given.values()):
        raise ConfigurationError.of(key, given, "one RoPE for all layers is supported, not one for each layer type")
    given.setdefault("rope_type", given.get("type", "default"))
    _check_keys(key, given)
    given.setdefault("rope_theta", config.get("rope_theta", default_theta))
    given.setdefault("partial_rotary_factor", config.get("partial_rotary_factor"))
    if given["rope_type"] in ("llama3", "yarn"):
        trained = given.get("original_max_position_embeddings") or config.get("max_position_embeddings")
        given["original_max_position_embeddings"] = config.get("original_max_position_embeddings", trained)
    return _checked(key, convert(given, RopeParameters, key + "."))


def convert(values: dict[str, Any], kind: type[Read], prefix: str = "") -> Read:
    """`values` as a struct of type `kind`; a wrong type or a missing key becomes a ConfigurationError that names it."""
    try:
        return msgspec.convert(values, kind)
    except msgspec.ValidationError as error:
        reason, _, path = str(error).partition(" - at `$.")
        if not path:
            raise ConfigurationError(f"{prefix}{reason.split('`')[1]} is missing: add it to config.json") from None
        key = path.rstrip("`").split("[")[0]
        raise ConfigurationError.of(prefix + key, values[key.split(".")[0]], reason[0].lower() + reason[1:]) from None


def _given(config: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    old, new = config.get("rope_scaling"), config.get("rope_parameters")
    if old and new and old != new:
        raise ConfigurationError.of("rope_scaling", old, f"contradicts rope_parameters = {new!r}: keep one of them")
    key = "rope_parameters" if new else "rope_scaling"
    try:
        value = msgspec.convert(new or old or {}, dict[str, Any])
    except msgspec.ValidationError:
        raise ConfigurationError.of(key, new or old, "must be an object") from None
    return key, {name: item for name, item in value.items() if item is not None}


def _check_keys(key: str, given: dict[str, Any]) -> None:
    kind = given["rope_type"]
    if not isinstance(kind, str) or kind not in _KEYS:
        raise ConfigurationError.of(f"{key}.rope_type", kind, f"is not supported: use one of {', '.join(_KEYS)}")
    if given.get("type", kind) != kind:
        raise ConfigurationError.of(f"{key}.type", given["type"], f"contradicts rope_type = {kind!r}")
    known = _KEYS[kind] | {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    for name in given.keys() - known:
        raise ConfigurationError.of(f"{key}.{name}", given[name], f"does not belong to RoPE of type {kind}: remove it")


def _checked(key: str, rope: RopeParameters) -> RopeParameters:
    if rope.partial_rotary_factor not in (None, 1.0):
        raise ConfigurationError.of("partial_rotary_factor", rope.partial_rotary_factor, "only 1 is supported")
    for name in _KEYS[rope.rope_type] - _YARN:
        if (value := getattr(rope, name)) is None or value <= 0:
            raise ConfigurationError.of(f"{key}.{name}", value, "must be given, and positive")
    for name in _YARN - {"truncate"}:
        if (value := getattr(rope, name)) is not None and value < 0:
            raise ConfigurationError.of(f"{key}.{name}", value, "must not be negative")
    if rope.rope_theta is None or rope.rope_theta <= 1:
        raise ConfigurationError.of("rope_theta", rope.rope_theta, "must be above 1")
    if rope.rope_type == "llama3" and (rope.high_freq_factor or 0) <= (rope.low_freq_factor or 0):
        raise ConfigurationError.of(f"{key}.high_freq_factor", rope.high_freq_factor, "must exceed low_freq_factor")
    return rope


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
