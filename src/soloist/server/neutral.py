"""Fields that other servers know and this one does not: taken where they ask for nothing, refused by name otherwise."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any

import msgspec

from soloist.errors import RequestError

LONGEST_SHOWN = 60  # characters of a value in an error
# The values that mean "do not"; null always does.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    # OpenAI's
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (False, True),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "store": (False,),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    # of an answer's message, which clients send back as it is
    "refusal": ("",),
    "tool_calls": ([],),
    "annotations": ([],),
    "reasoning_content": ("",),
    # vLLM's and SGLang's
    "continuous_usage_stats": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "spaces_between_special_tokens": (True,),
    "add_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "priority": (0,),
    "bad_words": ([],),
    "return_token_strs": (False,),
    "return_tokens_as_token_ids": (False,),
    "return_hidden_states": (False,),
    "include_reasoning": (True, False),
    "documents": ([],),
    "no_stop_trim": (False,),
}


def without_neutral(fields: Mapping[str, Any], kind: type[msgspec.Struct], place: str = "") -> dict[str, Any]:
    """The fields but for those that `kind` lacks and that ask for nothing.

    place: where they stand, for errors. Raises RequestError for one that asks for something.
    """
    known, kept = set(kind.__struct_fields__), dict(fields)
    for key in fields.keys() - known:
        if fields[key] is not None and fields[key] not in NEUTRAL.get(key, ()):
            raise RequestError(f"{place}{key}{_value(fields[key])}: {_remedy(key, known)}")
        del kept[key]
    return kept


def _remedy(key: str, known: Iterable[str]) -> str:
    if key in NEUTRAL:
        return f"is not supported by this server; leave it out, or give {_shown(NEUTRAL[key][0])}"
    near = difflib.get_close_matches(key, known, n=1)
    return f"unknown field, or not supported by this server; {f'there is {near[0]}' if near else 'leave it out'}"


def _value(value: Any) -> str:
    """For an error, unless it is long."""
    text = _shown(value)
    return f" = {text}" if len(text) <= LONGEST_SHOWN else ""


def _shown(value: Any) -> str:
    return msgspec.json.encode(value).decode()
