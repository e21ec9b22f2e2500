from __future__ import annotations

from pathlib import Path

import pytest
from torch.distributed import FileStore

from soloist.errors import CommunicationError, ConfigurationError
from soloist.transport.connect import connect


@pytest.mark.parametrize(
    ("kind", "device", "remedy"),
    [
        ("carrier pigeon", "cpu", "gloo, mpi, nccl, shared_memory"),
        ("gloo", "cuda:0", "on cpu"),
        ("nccl", "cpu", "on cuda"),
    ],
)
def test_what_cannot_be_connected(tmp_path: Path, kind: str, device: str, remedy: str) -> None:
    with pytest.raises(ConfigurationError, match=f"transport = '{kind}'.*{remedy}"):
        connect(kind, 0, 1, FileStore(str(tmp_path / "store"), 1), device)


@pytest.mark.parametrize("kind", ["gloo", "shared_memory"])
@pytest.mark.parametrize("rank", [0, 1])
def test_peer_that_does_not_come(tmp_path: Path, kind: str, rank: int) -> None:
    with pytest.raises(CommunicationError, match="connecting"):
        connect(kind, rank, 2, FileStore(str(tmp_path / "store"), 2), deadline_s=0.3)
