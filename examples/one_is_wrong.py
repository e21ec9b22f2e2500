"""One rank of four is wrong: what do the others say, and when?

    .venv/bin/python examples/one_is_wrong.py [FAULT …]

Starts the shipped model on four CPU ranks, as srun would, and spoils one of them in each of the ways below. Every other
rank has to end within its deadline, with an error that names the culprit. Prints the last words of each rank and the
time from the fault (or from the start) to its end. What a lost node does stands in `same_text.py`.
"""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from same_text import MODEL, PROMPT, free_port, start

RANKS, CULPRIT = 4, 2
START_S, DEADLINE_S = 20, 8  # of the start, and of waits in a step
GRACE_S = 150  # for a busy machine to import torch, and to end four processes
GENERATE = [
    "generate", MODEL, PROMPT, "--layout", "ep4", "--device", "cpu", "--transport", "gloo", "--ignore-eos",
    "--max-tokens", "400", "--set", f"deadline_s={DEADLINE_S}", "--set", f"start_deadline_s={START_S}",
]  # fmt: skip
OTHER_VERSION = (
    "import sys, soloist; soloist.__version__ = '0.0.9'; sys.argv[0] = 'soloist'; from soloist.cli import main; main()"  # noqa: E501
)
Ranks = dict[int, subprocess.Popen[str]]


def rank(number: int, port: int, *, words: list[str] | None = None, python: list[str] | None = None) -> subprocess.Popen[str]:  # fmt: skip  # noqa: E501
    """One process with the variables of a Slurm step."""
    step = {"SLURM_STEP_NUM_TASKS": RANKS, "SLURM_STEP_TASKS_PER_NODE": RANKS, "SLURM_STEP_NODELIST": "localhost"}
    step |= {"SLURM_PROCID": number, "SLURM_LOCALID": number, "MASTER_PORT": port}
    return start([*(python or ["-m", "soloist"]), *(words or GENERATE)], step)


def good(port: int, *, without: int = CULPRIT) -> Ranks:
    return {number: rank(number, port) for number in range(RANKS) if number != without}


# -- faults: each starts the ranks and spoils one --------------------------------------------------------------------
def missing(port: int, folder: Path) -> Ranks:
    """does not come"""
    return good(port)


def elsewhere(port: int, folder: Path) -> Ranks:
    """has a MASTER_PORT where nobody listens"""
    return good(port) | {CULPRIT: rank(CULPRIT, free_port())}


def stranger(port: int, folder: Path) -> Ranks:
    """has a MASTER_PORT where another program listens"""
    listener = socket.create_server(("127.0.0.1", 0))
    _open.append(listener)
    return good(port) | {CULPRIT: rank(CULPRIT, listener.getsockname()[1])}


def version(port: int, folder: Path) -> Ranks:
    """has another version of Soloist"""
    return good(port) | {CULPRIT: rank(CULPRIT, port, python=["-c", OTHER_VERSION])}


def layout(port: int, folder: Path) -> Ranks:
    """was started with another layout"""
    words = ["ep2tp2" if word == "ep4" else word for word in GENERATE]
    return good(port) | {CULPRIT: rank(CULPRIT, port, words=words)}


def checkpoint(port: int, folder: Path) -> Ranks:
    """has another checkpoint of the same name"""
    copy = folder / Path(MODEL).name
    shutil.copytree(MODEL, copy)
    with next(copy.glob("*.safetensors")).open("ab") as file:
        file.write(b"\0")
    words = [str(copy) if word == MODEL else word for word in GENERATE]
    return good(port) | {CULPRIT: rank(CULPRIT, port, words=words)}


def twice(port: int, folder: Path) -> Ranks:
    """comes twice, in place of rank 3"""
    return good(port, without=3) | {3: rank(CULPRIT, port)}


def killed(port: int, folder: Path) -> Ranks:
    """is killed while tokens are generated"""
    return _in_a_step(port, signal.SIGKILL)


def stopped(port: int, folder: Path) -> Ranks:
    """stands still while tokens are generated"""
    return _in_a_step(port, signal.SIGSTOP)


def _in_a_step(port: int, number: signal.Signals) -> Ranks:
    ranks = good(port, without=-1)
    assert ranks[0].stdout is not None
    ranks[0].stdout.read(len(PROMPT) + 20)
    ranks[CULPRIT].send_signal(number)
    return ranks


FAULTS: dict[Callable[[int, Path], Ranks], float] = {  # within how many seconds the others have to end
    missing: START_S, elsewhere: START_S, stranger: START_S, version: START_S, layout: START_S, checkpoint: START_S,
    twice: START_S, killed: DEADLINE_S, stopped: DEADLINE_S,
}  # fmt: skip
_open: list[socket.socket] = []


# -- what comes of them ------------------------------------------------------------------------------------------------
@contextmanager
def ended(ranks: Ranks) -> Iterator[None]:
    try:
        yield
    finally:
        for process in ranks.values():
            process.kill()
            process.wait()


def last_words(process: subprocess.Popen[str], limit_s: float) -> str:
    """The last line of its errors that is ours."""
    _, errors = process.communicate(timeout=limit_s)
    lines = [line.strip() for line in errors.splitlines() if "rank" in line and not line.startswith("[")]
    return lines[-1] if lines else errors.strip()[-300:]


def try_out(fault: Callable[[int, Path], Ranks], limit_s: float) -> bool:
    """Whether all others ended in time and named the culprit."""
    print(f"\nrank {CULPRIT} {fault.__doc__}; {limit_s:g} s are allowed", flush=True)
    fine = True
    with tempfile.TemporaryDirectory() as folder:
        ranks = fault(free_port(), Path(folder))
        begin = time.monotonic()
        with ended(ranks):
            for number in [n for n in ranks if n != CULPRIT or fault not in (killed, stopped)]:
                try:
                    told = last_words(ranks[number], max(0.1, begin + limit_s + GRACE_S - time.monotonic()))
                except subprocess.TimeoutExpired:
                    told = "DID NOT END"
                named = number == CULPRIT or f"rank {CULPRIT}" in told
                fine &= named and told != "DID NOT END" and ranks[number].returncode != 0
                mark = "  " if named else "! "
                print(f"{mark}rank {number}, {time.monotonic() - begin:.1f} s: {told}", flush=True)
    return fine


def main() -> None:
    wanted = sys.argv[1:] or [fault.__name__ for fault in FAULTS]
    results = {fault.__name__: try_out(fault, limit_s) for fault, limit_s in FAULTS.items() if fault.__name__ in wanted}
    print(
        "\n" + ", ".join(f"{name}: {'named in time' if fine else 'NOT AS PROMISED'}" for name, fine in results.items())
    )
    sys.exit(0 if all(results.values()) else 1)


if __name__ == "__main__":
    main()
