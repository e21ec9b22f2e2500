"""Chat templates: messages to the text that a model was trained to answer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from soloist.errors import CheckpointError, RequestError
from soloist.specs.files import read_text

Message = Mapping[str, Any]  # at least role and content


class ChatTemplate:
    """A checkpoint's Jinja template, run in a sandbox: it is somebody else's program."""

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _to_json
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        self._special_tokens = dict(special_tokens)
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"chat template, line {error.lineno}: {error.message}") from error

    @classmethod
    def load(cls, folder: Path | None, chosen: Path | None = None) -> ChatTemplate | None:
        """The file chosen, or `chat_template.jinja` or `tokenizer_config.json` of a checkpoint; None if there is none.

        Raises ConfigurationError where the chosen file cannot be read.
        """
        config = _read(folder / "tokenizer_config.json") if folder else {}
        file = chosen or (folder / "chat_template.jinja" if folder else None)
        source = read_text(file, "chat_template") if file and (chosen or file.exists()) else config.get("chat_template")
        if isinstance(source, list):  # several, by name
            source = next((entry["template"] for entry in source if entry["name"] == "default"), None)
        if source is None:
            return None
        tokens = {key: value for key, value in config.items() if key.endswith("_token") and value}
        return cls(
            source, {key: value["content"] if isinstance(value, dict) else value for key, value in tokens.items()}
        )

    def render(self, messages: Sequence[Message], wishes: Mapping[str, Any] | None = None, answers: bool = True) -> str:
        """The text up to where the model answers. Raises RequestError for messages that the template refuses.

        wishes: names that this template knows beyond the messages. answers: False leaves out how an answer begins.
        """
        own = {"messages": list(messages), "add_generation_prompt": answers, "tools": None}
        if taken := own.keys() & (wishes or {}).keys():
            raise RequestError(f"chat_template_kwargs: {min(taken)} is a field of its own")
        try:
            return self._template.render(**self._special_tokens | dict(wishes or {}) | own)
        except Exception as error:  # whatever somebody else's program makes of a client's values
            raise RequestError(f"messages: the chat template refuses them: {error}") from error


def _read(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text()) if path.exists() else {}
    except ValueError as error:
        raise CheckpointError(f"{path}: is not JSON ({error})") from error


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)
