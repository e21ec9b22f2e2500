"""Every error that Soloist raises on purpose.

    SoloistError
    ├── ConfigurationError    a key with a value that cannot be used: in a config, a flag, a layout, a placement, a plan
    ├── CheckpointError       weights missing, left over, of a wrong shape, truncated or not finite
    ├── ClusterError          the machine or the world of ranks is not what was asked for
    │   └── CommunicationError    a peer did not answer in time, or its connection broke
    ├── CapacityError         something does not fit: GPU memory, KV cache, a buffer
    └── RequestError          one request cannot be served; the others are unharmed

A user's error names the key, the value and the remedy. Invariants inside the code are asserts.
"""

from __future__ import annotations


class SoloistError(Exception):
    """Base of all errors raised on purpose."""


class ConfigurationError(SoloistError):
    """A key has a value that is inconsistent, unknown or unsupported."""

    @classmethod
    def of(cls, key: str, value: object, remedy: str) -> ConfigurationError:
        """The usual form: `key = value: remedy`."""
        return cls(f"{key} = {value!r}: {remedy}")


class CheckpointError(SoloistError):
    """A checkpoint does not hold what its config promises."""


class ClusterError(SoloistError):
    """The machine, or the world of ranks on it, is not what was asked for."""


class CommunicationError(ClusterError):
    """A peer did not answer within the deadline, or its connection broke."""

    def __init__(self, rank: int, peer: int | None, where: str, reason: str) -> None:
        self.rank, self.peer, self.where, self.reason = rank, peer, where, reason
        culprit = "a peer" if peer is None else f"rank {peer}"
        super().__init__(f"rank {rank}: {culprit}: {reason}" + (f" (in {where})" if where else ""))


class CapacityError(SoloistError):
    """Something does not fit into the memory that was set aside for it."""


class RequestError(SoloistError):
    """One request cannot be served. The others are unharmed."""
