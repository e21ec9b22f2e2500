"""Kernels that are launched early wait for those ahead before they touch anything but weights; and for peers before
they release."""

import ast
from functools import cache
from pathlib import Path

import torch

import soloist
from soloist.kernels.follow import early

FILES = (path.read_text() for path in Path(soloist.__file__).parent.rglob("*.py"))
SOURCES = [ast.parse(text) for text in FILES if "_kernel" in text]
OF_PEERS = ("await_all", "_hear")
WEIGHTS = ("weight_D", "q_norm_Q", "k_norm_Q")  # written by no kernel


@cache
def launched_early() -> set[str]:
    """Names of kernels whose launches take options from elsewhere: those of `early`."""
    calls = (node for tree in SOURCES for node in ast.walk(tree) if isinstance(node, ast.Call))
    return {
        call.func.value.id
        for call in calls
        if isinstance(call.func, ast.Subscript) and isinstance(call.func.value, ast.Name)
        for option in call.keywords
        if option.arg is None
    }  # fmt: skip


def calls_of(kernel: str) -> list[ast.Call]:
    """What a kernel calls, in the order of its lines."""
    definition = next(
        node for tree in SOURCES for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == kernel
    )
    body = [
        statement for statement in definition.body if not isinstance(statement, ast.Expr) or not _is_text(statement)
    ]
    calls = (node for statement in body for node in ast.walk(statement) if isinstance(node, ast.Call))
    return sorted(calls, key=lambda call: (call.lineno, call.col_offset))


def steps(kernel: str) -> list[str]:
    """The names of what it calls."""
    return [ast.unparse(call.func) for call in calls_of(kernel)]


def touched_before_it_waits(kernel: str) -> list[str]:
    """What it does with memory before it waits, of weights apart."""
    names = steps(kernel)
    waits = min(names.index(wait) for wait in ("follow", "await_previous") if wait in names)
    before = calls_of(kernel)[:waits]
    harmless = ("release_next", "tl.program_id", "tl.num_programs", "tl.arange", "tl.where", "tl.program_id(0).to")
    return [ast.unparse(call) for call in before if ast.unparse(call.func) not in harmless and not _reads_weights(call)]


def _reads_weights(call: ast.Call) -> bool:
    return ast.unparse(call.func) == "tl.load" and ast.unparse(call.args[0]).split()[0] in WEIGHTS


def _is_text(statement: ast.Expr) -> bool:
    return isinstance(statement.value, ast.Constant)


def test_whoever_is_launched_early_waits_first() -> None:
    kernels = launched_early()
    assert {"norm_kernel", "index_kernel", "part_index_kernel", "all_reduce_kernel"} <= kernels
    assert {kernel: found for kernel in kernels if (found := touched_before_it_waits(kernel))} == {}


def test_whoever_waits_for_peers_releases_after_that() -> None:
    for kernel in launched_early():
        called = steps(kernel)
        for peers in set(OF_PEERS) & set(called):
            assert "follow" not in called
            assert called.index("release_next") > called.index(peers)


def test_nothing_is_launched_early_on_a_cpu() -> None:
    assert early(torch.device("cpu")) == {}
