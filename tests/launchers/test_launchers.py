"""Scripts start as many ranks as planned, node by node; manifests fit their schemas."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path

import jsonschema
import msgspec
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from soloist import cli
from soloist.errors import ConfigurationError
from soloist.launchers.kubernetes import manifest
from soloist.launchers.scripts import WRITERS
from soloist.launchers.start import split_group, start_of
from soloist.planner.plan import Plan
from soloist.specs.cluster import cluster
from soloist.specs.layout import Layout

SCHEMA = json.loads(Path(__file__).with_name("leaderworkerset.schema.json").read_text())
SBATCH = {"job-name", "nodes", "ntasks-per-node", "gpus-per-node", "distribution", "exclusive"}  # of man sbatch
SRUN = {"kill-on-bad-exit", "gpu-bind", "distribution"}  # of man srun


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("plan") / "plan.json"
    arguments = ["plan", "mixtral-8x7b", "--cluster", "h100-ib", "--gpus", "8", "--out", str(file)]
    result = CliRunner().invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    return file


def plan_of(file: Path, layout: str, gpus_per_node: int) -> Plan:
    """The plan, for another layout on nodes of another size."""
    plan = Plan.load_file(file)
    parsed = Layout.parse(layout)
    nodes = msgspec.structs.replace(cluster("h100-ib"), gpus_per_node=gpus_per_node, max_gpus=None)
    placement = type(plan.placement).linear(plan.model, parsed.ep)
    return msgspec.structs.replace(plan, layout=parsed, cluster=nodes, placement=placement)


def run(tmp_path: Path, script: str, **environment: str) -> list[str]:
    """The words with which the launcher was called; the launchers are stand-ins that print them."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    for name in ("torchrun", "srun", "mpirun", "soloist"):
        version = '[ "${1-}" = --version ] && { echo "$MPI"; exit; }\n' if name == "mpirun" else ""
        (tools / name).write_text(f'#!/bin/bash\n{version}printf "%s\\n" {name} "$@" "MASTER_ADDR=${{MASTER_ADDR-}}"\n')
    (tools / "scontrol").write_text('#!/bin/bash\n[ "$1 $2 $3" = "show hostnames n[1-2]" ] && printf "n1\\nn2\\n"\n')
    for tool in tools.iterdir():
        tool.chmod(0o755)
    (tmp_path / "hosts").write_text("n1\nn2\n")
    given = {"PATH": f"{tools}:{os.environ['PATH']}", "MPI": "HYDRA build details", **environment}
    checked = subprocess.run(["bash", "-n"], input=script, text=True, capture_output=True, check=False)
    assert checked.returncode == 0, checked.stderr
    done = subprocess.run(["bash", "-c", script], cwd=tmp_path, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def script(target: str, file: Path, layout: str = "ep8", gpus_per_node: int = 4) -> str:
    return WRITERS[target](start_of(plan_of(file, layout, gpus_per_node), "plan.json", "models/m"))


COMMAND = ["soloist", "serve", "models/m", "--plan", "plan.json"]


def test_torchrun_on_every_node(tmp_path, plan_file):
    called = run(tmp_path, script("torchrun", plan_file), MASTER_ADDR="10.0.0.1", NODE_RANK="1")
    expected = ["torchrun", "--nnodes", "2", "--nproc-per-node", "4", "--node-rank", "1"]
    expected += ["--master-addr", "10.0.0.1", "--master-port", "29500", "-m", *COMMAND]
    assert called[:-1] == expected


def test_torchrun_needs_to_know_the_first_node(tmp_path, plan_file):
    with pytest.raises(AssertionError, match="MASTER_ADDR: the address of the first node"):
        run(tmp_path, script("torchrun", plan_file))


def test_a_batch_job(tmp_path, plan_file):
    text = script("slurm", plan_file)
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(.*)$", text, re.MULTILINE))
    assert set(options) <= SBATCH
    assert (options["nodes"], options["ntasks-per-node"], options["gpus-per-node"]) == ("2", "4", "4")
    called = run(tmp_path, text, SLURM_JOB_NODELIST="n[1-2]")
    flags = {word.removeprefix("--").partition("=")[0] for word in called[1 : called.index("soloist")]}
    assert flags == SRUN
    assert called[-1] == "MASTER_ADDR=n1"
    assert called[called.index("soloist") : -1] == COMMAND


@pytest.mark.parametrize(
    ("library", "words"),
    [
        ("mpirun (Open MPI) 5.0.11", ["-n", "8", "--hostfile", "hosts", "--map-by", "ppr:4:node", "--bind-to", "none"]),
        ("HYDRA build details", ["-n", "8", "-f", "hosts", "-ppn", "4"]),
    ],
)
def test_mpirun_of_both_kinds(tmp_path, plan_file, library, words):
    called = run(tmp_path, script("mpi", plan_file), MPI=library)
    assert called[1 : 1 + len(words)] == words
    assert called[-1] == "MASTER_ADDR=n1"
    assert called[called.index("soloist") : -1] == COMMAND


def test_this_machine(tmp_path, plan_file):
    assert run(tmp_path, script("local", plan_file, "ep4"))[:-1] == COMMAND
    with pytest.raises(ConfigurationError, match="--for = 'local': the plan needs 2 nodes"):
        script("local", plan_file)


@pytest.mark.parametrize("layout", ["ep8", "ep4", "tp4pp2"])
def test_a_manifest_fits_its_schemas(plan_file, layout):
    plan = plan_of(plan_file, layout, 4)
    config, workers, service = yaml.safe_load_all(manifest(start_of(plan, "/p", "m"), plan_file.read_text()))
    jsonschema.validate(workers, SCHEMA)
    assert json.loads(config["data"]["plan.json"]) == json.loads(plan_file.read_text())
    template = workers["spec"]["leaderWorkerTemplate"]
    assert template["size"] == plan.layout.size // 4
    for role in ("leaderTemplate", "workerTemplate"):
        pod = template[role]["spec"]
        (container,) = pod["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == 4
        assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
        assert "--host 0.0.0.0 --port 8000" in container["command"][-1]
        subprocess.run(["bash", "-n", "-c", container["command"][-1]], check=True)
    assert service["spec"]["selector"].items() <= template["leaderTemplate"]["metadata"]["labels"].items()
    assert not service["spec"]["selector"].items() <= template["workerTemplate"]["metadata"]["labels"].items()


def test_the_schema_refuses_what_is_wrong(plan_file):
    text = manifest(start_of(plan_of(plan_file, "ep8", 4), "/p", "m"), plan_file.read_text())
    for old, new in (("size: 2", "size: 0"), ("RecreateGroupOnPodRestart", "Always"), ("mountPath:", "path:")):
        _, workers, _ = yaml.safe_load_all(text.replace(old, new))
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(workers, SCHEMA)


# -- which ranks lie on which node -----------------------------------------------------------------------------------
@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3, 4]), st.integers(1, 6), st.sampled_from([2, 4, 6, 8]))
def test_tp_groups_lie_within_a_node_or_are_refused(pp, tp, ep, per_node):
    layout = Layout(pp=pp, ep=ep, tp=tp)
    node_of = [rank // per_node for rank in range(layout.size)]
    whole = all(len({node_of[peer] for peer in layout.at(rank).tp_peers}) == 1 for rank in range(layout.size))
    assert (split_group(layout, per_node) == ()) == whole


@pytest.mark.parametrize(
    ("layout", "gpus_per_node", "message"),
    [
        ("ep4tp2", 3, "its 8 ranks do not fill 3 equal nodes"),
        ("tp8", 4, "the TP group of ranks 0–7 would lie on two nodes of 4: choose another tp"),
    ],
)
def test_layouts_that_do_not_fit_nodes(plan_file, layout, gpus_per_node, message):
    with pytest.raises(ConfigurationError, match=message):
        start_of(plan_of(plan_file, layout, gpus_per_node), "plan.json", None)


def test_nodes_that_are_not_full_are_declared_smaller(plan_file):
    start = start_of(plan_of(plan_file, "ep12", 8), "plan.json", "m")
    assert (start.nodes, start.ranks_per_node) == (2, 6)
    assert start.arguments[-2:] == ("--set", "gpus_per_node=6")


# -- the command -----------------------------------------------------------------------------------------------------
def launch(*arguments: str):
    return CliRunner().invoke(cli.app, ["launch", *arguments])


def test_the_command_writes_a_file(tmp_path, plan_file):
    out = tmp_path / "job.sh"
    assert launch(str(plan_file), "--for", "slurm", "--out", str(out)).exit_code == 0
    assert f"soloist serve mistralai/Mixtral-8x7B-v0.1 --plan {plan_file}" in out.read_text()


def test_another_command_than_serve(plan_file):
    result = launch(str(plan_file), "--for", "local", "--", "generate", "models/m", "It was a")
    assert f"exec soloist generate models/m 'It was a' --plan {plan_file}\n" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-plan.json"], "plan = 'no-plan.json': cannot be read"),
        (["PLAN", "--for", "carrier-pigeon"], "--for = 'carrier-pigeon': choose one of torchrun"),
        (["PLAN", "--", "nosuchcommand"], "-- = 'nosuchcommand': is no command of soloist; there is plan"),
        (["PLAN", "--out", "/no/such/folder/x"], "--out = '/no/such/folder/x': there is no folder"),
    ],
)
def test_what_cannot_be_written(plan_file, arguments, message):
    result = launch(*(str(plan_file) if word == "PLAN" else word for word in arguments))
    assert result.exit_code == cli.USER_ERROR
    assert message in result.stderr
