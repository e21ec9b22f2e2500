"""Shell scripts: torchrun on every node, sbatch and srun, mpirun, and the local launcher."""

from __future__ import annotations

from collections.abc import Callable

from soloist.errors import ConfigurationError
from soloist.launchers.start import Start
from soloist.planner.environment import Variable


def torchrun(start: Start) -> str:
    """Run on every node, with MASTER_ADDR the address of the first and NODE_RANK 0, 1, …"""
    usage = f"""\
# Run this on each of the {start.nodes} nodes, with NODE_RANK=0 on the first and MASTER_ADDR its address on all of them.
: "${{MASTER_ADDR:?the address of the first node}}" "${{NODE_RANK:?0 on the first node, 1 on the second, …}}"
"""
    return f"""\
#!/usr/bin/env bash
# {_title(start)}
set -euo pipefail
{usage if start.nodes > 1 else ""}{_exports(start)}
exec torchrun --nnodes {start.nodes} --nproc-per-node {start.ranks_per_node} --node-rank "${{NODE_RANK:-0}}" \\
    --master-addr "${{MASTER_ADDR:-127.0.0.1}}" --master-port "${{MASTER_PORT:-{start.master_port}}}" \\
    -m {start.command}
"""


def slurm(start: Start) -> str:
    """For sbatch. Block distribution numbers ranks node by node; a rank sees all GPUs of its node and takes its own."""
    return f"""\
#!/usr/bin/env bash
# {_title(start)}
# Submit with: sbatch <this>; partition, account and time are your cluster's.
#SBATCH --job-name=soloist
#SBATCH --nodes={start.nodes}
#SBATCH --ntasks-per-node={start.ranks_per_node}
#SBATCH --gpus-per-node={start.ranks_per_node}
#SBATCH --distribution=block:block
#SBATCH --exclusive
set -euo pipefail
export MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_PORT=${{MASTER_PORT:-{start.master_port}}}
{_exports(start)}
exec srun --kill-on-bad-exit=1 --gpu-bind=none --distribution=block:block {start.command}
"""


def mpi(start: Start) -> str:
    """For Open MPI's mpirun and MPICH's, whose options differ."""
    names = " ".join(variable.name for variable in start.variables if _is_safe(variable))
    hosts = (
        ""
        if start.nodes == 1
        else "# Write the nodes' names into the file `hosts`, one a line, the first node first.\n"
    )
    openmpi_hosts, mpich_hosts = ("", "") if start.nodes == 1 else ("--hostfile hosts ", "-f hosts ")
    return f"""\
#!/usr/bin/env bash
# {_title(start)}
set -euo pipefail
{hosts}export MASTER_ADDR=${{MASTER_ADDR:-{"127.0.0.1" if start.nodes == 1 else "$(head -n 1 hosts)"}}}
export MASTER_PORT=${{MASTER_PORT:-{start.master_port}}}
{_exports(start)}
given=()
if mpirun --version | grep -q "Open MPI"; then
    for name in MASTER_ADDR MASTER_PORT {names}; do given+=(-x "$name"); done
    exec mpirun -n {start.ranks} {openmpi_hosts}--map-by ppr:{start.ranks_per_node}:node --bind-to none \\
        "${{given[@]}}" {start.command}
fi
for name in MASTER_ADDR MASTER_PORT {names}; do given+=(-genv "$name" "${{!name}}"); done
exec mpirun -n {start.ranks} {mpich_hosts}-ppn {start.ranks_per_node} "${{given[@]}}" \\
    {start.command}
"""


def local(start: Start) -> str:
    """Without any launcher: Soloist starts the ranks of one machine itself."""
    if start.nodes > 1:
        remedy = f"the plan needs {start.nodes} nodes; choose torchrun, slurm, mpi or k8s"
        raise ConfigurationError.of("--for", "local", remedy)
    return f"#!/usr/bin/env bash\n# {_title(start)}\nset -euo pipefail\n{_exports(start)}\nexec {start.command}\n"


WRITERS: dict[str, Callable[[Start], str]] = {"torchrun": torchrun, "slurm": slurm, "mpi": mpi, "local": local}


def _title(start: Start) -> str:
    return (
        f"soloist: layout {start.layout}, {start.ranks} ranks on {start.nodes} node(s), {start.ranks_per_node} on each"
    )


def _is_safe(variable: Variable) -> bool:
    """Names of devices are the cluster's, and a choice for one MPI or network can stop another from starting."""
    return not variable.value.startswith("<") and not variable.name.startswith(("OMPI_", "UCX_", "MPIR_"))


def _exports(start: Start) -> str:
    """What depends on the cluster is left to the user, as comments."""
    lines = [f"{'' if _is_safe(v) else '# '}export {v.name}={v.value}  # {v.why}" for v in start.variables]
    return "\n".join(lines)
