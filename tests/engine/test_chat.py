"""Chat templates are programs of others: what they give, and what they may not do."""

from __future__ import annotations

import json

import pytest

from soloist.engine.chat import ChatTemplate
from soloist.errors import CheckpointError, RequestError

TEMPLATE = """{{ bos_token }}{% for message in messages %}
    {% if message.role == "system" %}{{ raise_exception("no system role") }}{% endif %}
<{{ message.role }}>{{ message.content }}
{% endfor %}
{% if add_generation_prompt %}<assistant>{% endif %}"""
QUESTION = [{"role": "user", "content": "Who? <ä>"}]


def test_messages_become_the_text_that_the_model_answers():
    assert ChatTemplate(TEMPLATE, {"bos_token": "<s>"}).render(QUESTION) == "<s><user>Who? <ä>\n<assistant>"


def test_a_template_may_refuse():
    with pytest.raises(RequestError, match="no system role"):
        ChatTemplate(TEMPLATE, {}).render([{"role": "system", "content": "x"}])


def test_a_template_cannot_reach_out_of_its_sandbox():
    with pytest.raises(RequestError, match="unsafe"):
        ChatTemplate("{{ messages.__class__.__mro__ }}", {}).render(QUESTION)


def test_json_in_templates_is_not_escaped_for_html():
    assert ChatTemplate("{{ messages[0].content | tojson }}", {}).render(QUESTION) == '"Who? <ä>"'


@pytest.mark.parametrize(
    "in_config", [TEMPLATE, [{"name": "tools", "template": "no"}, {"name": "default", "template": TEMPLATE}]]
)
def test_templates_come_from_the_tokenizer_config(tmp_path, in_config):
    config = {"chat_template": in_config, "bos_token": {"content": "<s>"}, "pad_token": None}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert ChatTemplate.load(tmp_path).render(QUESTION).startswith("<s><user>")


def test_or_from_a_file_of_their_own(tmp_path):
    (tmp_path / "chat_template.jinja").write_text("hello")
    assert ChatTemplate.load(tmp_path).render(QUESTION) == "hello"
    (tmp_path / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(CheckpointError, match="line 1"):
        ChatTemplate.load(tmp_path)


def test_a_model_may_have_none(tmp_path):
    assert ChatTemplate.load(tmp_path) is None
