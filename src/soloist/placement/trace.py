"""Recorded routing of a model: which experts its tokens chose, in one file that planner and solver read.

Shape legend: L MoE layers, E experts, T tokens of the sample, K top-k.

A trace always holds how often each expert was chosen and how often each pair of experts was chosen by the same token;
of some of the tokens, the *sample*, it may hold the choice itself. The file is a NumPy archive of plain arrays.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from soloist.errors import ConfigurationError
from soloist.placement.archive import Array, read_arrays
from soloist.specs.files import write_file
from soloist.specs.model import ModelSpec, Spec

FORMAT = "soloist-trace/1"


class TraceModel(Spec, frozen=True, kw_only=True):
    """Whose routing it is. A trace serves no other model: the experts of two models have nothing in common."""

    name: str
    layers: int
    moe_layers: int
    experts: int
    top_k: int
    d_model: int
    vocab: int

    @classmethod
    def of(cls, spec: ModelSpec) -> TraceModel:
        return cls(
            name=spec.name,
            layers=spec.layers,
            moe_layers=len(spec.moe_layers),
            experts=spec.experts,
            top_k=spec.router.top_k,
            d_model=spec.d_model,
            vocab=spec.vocab,
        )

    def __str__(self) -> str:
        shape = f"{self.moe_layers} MoE layers of {self.experts} experts, top-{self.top_k}, width {self.d_model}"
        return f"{self.name} ({shape}, vocabulary {self.vocab})"

    def is_same(self, other: TraceModel) -> bool:
        """Same shape, and the same name apart from owner and case."""
        names = {model.name.rsplit("/", 1)[-1].lower() for model in (self, other)}
        return len(names) == 1 and _nameless(self) == _nameless(other)


def _nameless(model: TraceModel) -> TraceModel:
    return msgspec.structs.replace(model, name="")


@dataclass(frozen=True)
class Sample:
    """The choices of some tokens, in order of sequence and position.

    `source_T` is the rank that sent the token to its experts and `index_T` the token's place among those that this rank
    sent in the same step: with these the runtime's choice among replicas can be repeated.
    """

    ids_LTK: Array  # logical experts
    token_T: Array  # ids of the vocabulary that went into the model
    sequence_T: Array
    position_T: Array
    source_T: Array
    index_T: Array

    @property
    def tokens(self) -> int:
        return len(self.token_T)

    @classmethod
    def joined(cls, parts: Sequence[Sample]) -> Sample:
        """One after the other."""
        names = vars(parts[0])
        return cls(**{n: np.concatenate([vars(part)[n] for part in parts], axis=int(n == "ids_LTK")) for n in names})

    def first(self, tokens: int) -> Sample:
        """The first `tokens` of it."""
        rows = {name: array[:tokens] for name, array in vars(self).items() if name != "ids_LTK"}
        return Sample(ids_LTK=self.ids_LTK[:, :tokens], **rows)

    def prompts(self) -> list[list[int]]:
        """The input tokens of each sequence."""
        edges = np.flatnonzero(np.diff(self.sequence_T)) + 1
        return [part.tolist() for part in np.split(self.token_T, edges)]


@dataclass(frozen=True)
class RoutingTrace:
    """`tokens` tokens were counted; `together_LEE` is symmetric, with the counts on its diagonal."""

    model: TraceModel
    tokens: int
    counts_LE: Array
    together_LEE: Array
    sample: Sample | None = None

    @classmethod
    def of_sample(cls, model: TraceModel, sample: Sample) -> RoutingTrace:
        """Counts of a sample's tokens, together with the sample."""
        together_LEE = np.stack([together(ids_TK, model.experts) for ids_TK in sample.ids_LTK])
        return cls(model, sample.tokens, np.diagonal(together_LEE, axis1=1, axis2=2).copy(), together_LEE, sample)

    def check(self, spec: ModelSpec) -> None:
        """Raise ConfigurationError, naming both, where this is the trace of another model."""
        wanted = TraceModel.of(spec)
        if not self.model.is_same(wanted):
            remedy = f"was recorded from another model than {wanted}; record one with soloist record"
            if _nameless(self.model) == _nameless(wanted):
                own = self.model.name.rsplit("/", 1)[-1]
                remedy += f", or, if only its folder has another name, call that {own} again"
            raise ConfigurationError.of("trace", str(self.model), remedy)

    @property
    def needed_sample(self) -> Sample:
        """The sample. Raises ConfigurationError where only counts were recorded."""
        if self.sample is None:
            raise ConfigurationError.of(
                "trace", str(self.model), "holds counts only; record the choices themselves too"
            )
        return self.sample

    def keep(self, tokens: int) -> RoutingTrace:
        """The same counts with a smaller sample."""
        return replace(self, sample=self.sample.first(tokens) if self.sample and tokens else None)

    def save(self, path: str | Path) -> None:
        arrays = {"counts_LE": self.counts_LE, "together_LEE": np.stack([np.triu(t) for t in self.together_LEE])}
        if self.sample:
            arrays |= vars(self.sample) | {"ids_LTK": np.sort(self.sample.ids_LTK, axis=2)}
        header = {"format": FORMAT, "tokens": self.tokens, "model": msgspec.to_builtins(self.model)}
        packed = {name: _narrow(array) for name, array in arrays.items()}
        content = io.BytesIO()
        np.savez_compressed(content, header=np.frombuffer(msgspec.json.encode(header), np.uint8), **packed)  # pyright: ignore
        write_file(path, content.getvalue())

    @classmethod
    def load(cls, path: str | Path) -> RoutingTrace:
        """Raises ConfigurationError for a file that is not a trace."""
        arrays = _read(Path(path))
        try:
            header = msgspec.json.decode(arrays.pop("header").tobytes(), type=_Header)
            trace = _from_arrays(header, arrays)
        except (KeyError, TypeError, ValueError, msgspec.DecodeError) as error:
            raise ConfigurationError.of("trace", str(path), f"is not a complete trace: {error!r}") from error
        trace._check(str(path))
        return trace

    def _check(self, path: str) -> None:
        m, sample = self.model, self.sample
        if self.counts_LE.shape != (m.moe_layers, m.experts):
            raise ConfigurationError.of("trace", path, f"its counts have the shape {self.counts_LE.shape}, not of {m}")
        if sample and (sample.ids_LTK.shape != (m.moe_layers, sample.tokens, m.top_k)):
            raise ConfigurationError.of("trace", path, f"its sample has the shape {sample.ids_LTK.shape}, not of {m}")
        if sample and sample.ids_LTK.max(initial=0) >= m.experts:
            raise ConfigurationError.of("trace", path, f"names expert {sample.ids_LTK.max()} of {m}")


class _Header(msgspec.Struct):
    format: str
    tokens: int
    model: TraceModel


def together(ids_TK: Array, experts: int) -> Array:
    """`[E, E]` tokens that chose both experts."""
    k = ids_TK.shape[1]
    pairs = ids_TK[:, :, None].astype(np.int64) * experts + ids_TK[:, None, :]
    return np.bincount(pairs.ravel(), minlength=experts**2).reshape(experts, experts) if k else np.zeros((experts,) * 2)


def _from_arrays(header: _Header, arrays: dict[str, Array]) -> RoutingTrace:
    if header.format != FORMAT:
        raise ValueError(f"format {header.format}; this version reads {FORMAT}")
    counts_LE, upper_LEE = (arrays.pop(name).astype(np.int64) for name in ("counts_LE", "together_LEE"))
    below_LEE = np.stack([np.tril(upper.T, -1) for upper in upper_LEE])
    sample = Sample(**{name: array.astype(np.int64) for name, array in arrays.items()}) if arrays else None
    return RoutingTrace(header.model, header.tokens, counts_LE, upper_LEE + below_LEE, sample)


def _narrow(array: Array) -> Array:
    """In the smallest type that holds it."""
    least, most = (np.min_scalar_type(int(end)) for end in (array.min(initial=0), array.max(initial=0)))
    return array.astype(np.promote_types(least, most))


def _read(path: Path) -> dict[str, Array]:
    try:
        return read_arrays(path)
    except OSError as error:
        raise ConfigurationError.of(
            "trace", str(path), f"cannot be read: {error.strerror or error}; `soloist record` makes one"
        ) from error
    except ValueError as error:
        raise ConfigurationError.of("trace", str(path), "is not a trace; soloist record makes one") from error
