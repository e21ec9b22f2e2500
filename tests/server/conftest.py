"""Servers in front of the shipped model, and leaders without a model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from soloist.engine.llm import LLM
from soloist.server.served import Served
from tests.server.live import NOVELS, TEMPLATE, Fake, Live, live


@pytest.fixture
def fake(short_path) -> Iterator[Fake]:
    made = Fake(short_path)
    yield made
    made.close()


@pytest.fixture(scope="session")
def novels(tmp_path_factory) -> Iterator[Served]:
    template = tmp_path_factory.mktemp("chat") / "chat.jinja"
    template.write_text(TEMPLATE)
    with LLM(NOVELS, layout="ep2", device="cpu", chat_template=template, count_experts=True, measure=True) as llm:
        yield Served.of(llm, "novels")


@pytest.fixture(scope="module")
def server(novels) -> Iterator[Live]:
    with live(novels) as running:
        yield running
