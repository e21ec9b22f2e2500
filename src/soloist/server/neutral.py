"""Fields that other servers know and this one does not: taken where they ask for nothing, refused by name otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from soloist.errors import RequestError

# The values that mean "do not"; null always does.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    # OpenAI's
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "echo": (False,),
    "suffix": ("",),
    "best_of": (1,),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (False, True),
    "functions": ([],),
    "function_call": ("none",),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
    # of an answer's message, which clients send back as it is
    "refusal": ("",),
    "tool_calls": ([],),
    "annotations": ([],),
    "reasoning_content": ("",),
    # vLLM's
    "continuous_usage_stats": (False,),
    "use_beam_search": (False,),
    "length_penalty": (1,),
    "early_stopping": (False,),
    "min_tokens": (0,),
    "skip_special_tokens": (True,),
    "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,),
    "add_special_tokens": (True,),
    "add_generation_prompt": (True,),
    "continue_final_message": (False,),
    "chat_template_kwargs": ({},),
    "priority": (0,),
    "bad_words": ([],),
    "return_token_strs": (False,),
}


def without_neutral(fields: Mapping[str, Any], kind: type[msgspec.Struct], place: str = "") -> dict[str, Any]:
    """The fields but for those that `kind` lacks and that ask for nothing.

    place: where they stand, for errors. Raises RequestError for one that asks for something.
    """
    kept = dict(fields)
    for key in fields.keys() - set(kind.__struct_fields__):
        if fields[key] is None or fields[key] in NEUTRAL.get(key, ()):
            del kept[key]
        elif key in NEUTRAL:
            raise RequestError(f"{place}{key}: is not supported by this server")
    return kept
