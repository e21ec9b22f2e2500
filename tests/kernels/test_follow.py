"""Kernels that are launched early wait for those ahead before they do anything, and for peers before they release."""

import ast
from functools import cache
from pathlib import Path

import torch

import soloist
from soloist.kernels.follow import early

FILES = (path.read_text() for path in Path(soloist.__file__).parent.rglob("*.py"))
SOURCES = [ast.parse(text) for text in FILES if "_kernel" in text]
OF_PEERS = ("await_all", "_hear")


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


def steps(kernel: str) -> list[str]:
    """Names of the functions that a kernel calls, in the order of its lines."""
    definition = next(
        node for tree in SOURCES for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name == kernel
    )
    body = [
        statement for statement in definition.body if not isinstance(statement, ast.Expr) or not _is_text(statement)
    ]
    calls = (node for statement in body for node in ast.walk(statement) if isinstance(node, ast.Call))
    return [ast.unparse(call.func) for call in sorted(calls, key=lambda call: (call.lineno, call.col_offset))]


def _is_text(statement: ast.Expr) -> bool:
    return isinstance(statement.value, ast.Constant)


def test_whoever_is_launched_early_waits_first() -> None:
    kernels = launched_early()
    assert {"norm_kernel", "index_kernel", "part_index_kernel", "all_reduce_kernel"} <= kernels
    assert {
        kernel: steps(kernel)[0] for kernel in kernels if steps(kernel)[0] not in ("follow", "await_previous")
    } == {}


def test_whoever_waits_for_peers_releases_after_that() -> None:
    for kernel in launched_early():
        called = steps(kernel)
        for peers in set(OF_PEERS) & set(called):
            assert "follow" not in called
            assert called.index("release_next") > called.index(peers)


def test_nothing_is_launched_early_on_a_cpu() -> None:
    assert early(torch.device("cpu")) == {}
