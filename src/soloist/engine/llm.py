"""`LLM`: a model on a layout of ranks, from one object in one process. Imports no torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from soloist.engine.chat import ChatTemplate, Message
from soloist.engine.launch import launch
from soloist.engine.meeting import Job
from soloist.engine.model import Model
from soloist.engine.options import EngineOptions
from soloist.engine.outputs import RequestOutput, StreamPart
from soloist.engine.progress import Show, StartUp
from soloist.errors import ConfigurationError, RequestError
from soloist.frontend.frontend import FrontEnd
from soloist.frontend.requests import Request
from soloist.frontend.wire import Figures
from soloist.placement.placement import Placement
from soloist.scheduling.request import SamplingParams
from soloist.scheduling.scheduler import SchedulerStats
from soloist.specs.layout import Layout
from soloist.specs.model import ModelSpec

Prompt = str | Sequence[int]
Tokens = Callable[[], Sequence[int]]  # a prompt's tokens; raises RequestError where there are none
CLOSE_S = 5.0  # for ranks that were asked to end


class LLM:
    """Runs a model and answers prompts.

        with LLM("models/novels-moe-11m", layout="ep16") as llm:
            print(llm.generate("It was a", SamplingParams(max_tokens=50))[0].outputs[0].text)

    model: a checkpoint's folder, a hub id, or the name of a preset together with `random_weights`, a seed.
    placement: a Placement or its file; by default neighbouring experts lie together.
    options: an `EngineOptions`, or its fields as keywords.
    show_progress: a bar on a terminal; "lines": one on stderr for each part of the start. `start_s` keeps when each
    was reached by all ranks, in seconds from the beginning.
    chat_template: a Jinja file that replaces the checkpoint's own.

    A prompt is a text or a list of token ids. Among several prompts, one that cannot be served has an `error` in its
    output and harms no other; a single prompt raises it as RequestError. When a rank is lost, ClusterError is raised.
    Methods may be called from several threads.

    Under torchrun, mpirun or srun rank 0 goes on from here; the others serve it inside this constructor, and leave the
    program with SystemExit when it closes.
    """

    def __init__(
        self,
        model: str | Path,
        layout: str | Layout = "ep1",
        placement: Placement | str | Path | None = None,
        options: EngineOptions | None = None,
        *,
        chat_template: Path | None = None,
        show_progress: Show = True,
        make_executor: Callable[..., Any] | None = None,
        **fields: Any,
    ) -> None:
        if options is not None and fields:
            raise ConfigurationError.of("options", sorted(fields), "give either options or their fields as keywords")
        self.options = options or EngineOptions.of(fields)
        found = Model.find(model, self.options.random_weights is not None)
        self.spec = found.spec
        self.layout = Layout.parse(layout) if isinstance(layout, str) else layout
        self.layout.check(self.spec)
        self.placement = placement_from(placement, self.spec, self.layout)
        self.tokenizer = found.read_tokenizer()
        self.template = ChatTemplate.load(found.folder, chat_template)
        job = Job(self.spec, self.layout, self.placement, self.options, found.folder, found.tokenizer)
        self._lock = threading.RLock()
        self._ranks = launch(job, make_executor)
        self.front = FrontEnd(self.layout, self.spec.vocab, self._ranks.hub, self.options.deadline_s, self._ranks.ended)
        try:
            with StartUp(self.layout.size, show_progress) as start:
                self.front.wait_ready(self.options.start_deadline_s, start.update)
                start.update(self.front.ranks)
            self.start_s = start.reached_s
        except BaseException:
            self.close()
            raise

    # -- answers ----------------------------------------------------------------------------------------------------
    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        on_done: Callable[[], None] | None = None,
    ) -> list[RequestOutput]:
        """Continue each prompt; outputs in the order of the prompts.

        params: one for all prompts, or one for each. on_done: called whenever another request has been served.
        """
        single, several = _as_list(prompts)
        outputs = self._answer([self._encoded(p) for p in several], _params(params, len(several)), on_done)
        return [_one(outputs)] if single else outputs

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> RequestOutput:
        """Answer a conversation, `[{"role": "user", "content": "…"}, …]`, in the form of the model's chat template."""
        return _one(self._answer([lambda: self.chat_tokens(messages)], _params(params, 1)))

    def stream(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> Iterator[StreamPart]:
        """As `generate`, but every piece as it comes. Leaving the loop aborts what is not finished."""
        single, several = _as_list(prompts)
        booked = self._book([self._encoded(p) for p in several], _params(params, len(several)))
        try:
            yield from self._parts(booked, single)
        finally:
            self._abort(booked)

    def tokens(self, text: str) -> list[int]:
        """A text as the model's tokens, special ones added as the tokenizer does. Raises RequestError without one."""
        return self._encode(text, add_special_tokens=True)

    def chat_tokens(self, messages: Sequence[Message]) -> list[int]:
        """A conversation as the model's tokens, up to where it answers."""
        if self.template is None:
            raise RequestError("messages: this model has no chat template; use generate")
        return self._encode(self.template.render(messages), add_special_tokens=False)

    # -- the engine itself ------------------------------------------------------------------------------------------
    def stats(self) -> dict[int, SchedulerStats]:
        """What the leaders' schedulers looked like after their last step."""
        return {rank: report.stats for rank, report in self.front.ranks.items() if report.stats}

    def figures(self) -> dict[int, Figures]:
        """What every rank did since the last call: phases (with `measure`), bytes sent, memory."""
        with self._lock:
            return self.front.figures()

    def close(self) -> None:
        """End the ranks and remove everything temporary. Idempotent."""
        with self._lock:
            patience_s = 0.0 if self.front.failure else CLOSE_S
            self.front.close()
            self._ranks.close(patience_s)

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- requests ---------------------------------------------------------------------------------------------------
    def _answer(
        self, prompts: Sequence[Tokens], params: Sequence[SamplingParams], on_done: Callable[[], None] | None = None
    ) -> list[RequestOutput]:
        booked = self._book(prompts, params, on_done)
        try:
            for request in booked:
                while isinstance(request, Request) and not request.done:
                    self._pump()
        finally:
            self._abort(booked)
        return [RequestOutput.of(request) for request in booked]

    def _parts(self, booked: Sequence[Request | RequestError], single: bool) -> Iterator[StreamPart]:
        for index, request in enumerate(booked):
            if isinstance(request, RequestError):
                if single:
                    raise request
                yield StreamPart(index, 0, "", (), "error", str(request))
        waiting = {index: request for index, request in enumerate(booked) if isinstance(request, Request)}
        while waiting:
            for index, request in list(waiting.items()):
                while request.news:
                    yield StreamPart.of(index, *request.news.popleft())
                if request.done:
                    del waiting[index]
                    if single and request.error:
                        raise RequestError(request.error)
            if waiting:
                self._pump()

    def _book(
        self, prompts: Sequence[Tokens], params: Sequence[SamplingParams], on_done: Callable[[], None] | None = None
    ) -> list[Request | RequestError]:
        """Submit every prompt; one that cannot be served stands as its error."""
        booked: list[Request | RequestError] = []
        for prompt, wish in zip(prompts, params, strict=True):
            try:
                tokens = prompt()
                with self._lock:
                    request = self.front.submit(tokens, wish)
                    request.on_done = on_done
                booked.append(request)
            except RequestError as error:
                booked.append(error)
        return booked

    def _pump(self) -> None:
        """Take in what the ranks have sent. Where one is lost the others are ended, and the cause is raised."""
        with self._lock:
            self.front.pump()
            if self.front.failure:
                self.close()
            self.front.raise_failure()

    def _abort(self, booked: Sequence[Request | RequestError]) -> None:
        with self._lock:
            for request in booked:
                if isinstance(request, Request):
                    self.front.abort(request)

    def _encoded(self, prompt: Prompt) -> Tokens:
        return lambda: self.tokens(prompt) if isinstance(prompt, str) else prompt

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        if self.tokenizer is None:
            raise RequestError("prompt: this model has no tokenizer; give token ids")
        return self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids


def placement_from(given: Placement | str | Path | None, spec: ModelSpec, layout: Layout) -> Placement:
    """The placement asked for, checked against the model and the layout."""
    if given is None:
        return Placement.linear(spec, layout.ep)
    placement = given if isinstance(given, Placement) else Placement.load(given)
    placement.check(spec, layout)
    return placement


def _as_list(prompts: Prompt | Sequence[Prompt]) -> tuple[bool, list[Prompt]]:
    """Whether it is a single prompt, and the prompts as a list. An empty list is a list without prompts."""
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return True, [prompts]  # type: ignore[list-item]
    return False, list(prompts)  # type: ignore[arg-type]


def _params(params: SamplingParams | Sequence[SamplingParams] | None, prompts: int) -> list[SamplingParams]:
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * prompts
    if len(params) != prompts:
        raise ConfigurationError.of(
            "params", f"{len(params)} of them", f"give one, or one for each of {prompts} prompts"
        )
    return list(params)


def _one(outputs: list[RequestOutput]) -> RequestOutput:
    (output,) = outputs
    if output.error:
        raise RequestError(output.error)
    return output
