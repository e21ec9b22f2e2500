"""What a serving system adds to its kernels: fixed costs of layers and steps, overlap, imbalance, pipeline losses.

Fitted for each system to its published deployments; a system without any has the priors.
"""

from __future__ import annotations

from collections.abc import Mapping

from soloist.planner.calibration import UNMEASURED, Calibration
from soloist.planner.fitting import Prior
from soloist.planner.kernels import library_of
from soloist.specs.model import Spec

SYSTEM: dict[str, Prior] = {
    "kernels": Prior(1.0, 0.12),  # time of its matrix multiplications and attention over the calibrated kernels'
    "layer_us": Prior(20, 0.4),  # norms, router, residuals, launches of one layer
    "step_us": Prior(600, 0.7),  # scheduling, sampling, graph launch
    "expert_flops": Prior(1.1, 0.15),  # arithmetic time of its expert kernels over the calibrated kernels'
    "overlap_prefill": Prior(0.7, 0.15, 0.95),  # share of the shorter of compute and exchange that is hidden, as two-
    # batch overlap was measured to gain: 27-35 % in prefill, -27 % at 32 and +25.5 % at 256 tokens a GPU in decode
    "overlap_decode": Prior(0.75, 0.04, 0.95),
    "waiting": Prior(1.2, 0.1),  # dispatch and combine in a running system over the unit test: ranks arrive apart
    "imbalance": Prior(1.1, 0.05),  # fullest over mean expert group after balancing
    "pipeline": Prior(0.85, 0.25, 1.0),  # share of time in which the stages of a pipeline full of prefill chunks work
    "prefill": Prior(1.0, 0.001),  # the same of prefill alone
    "first_us": Prior(0.001, 0.001),  # once for prompts that come together: requests made, first launches, answers
    "sequence_us": Prior(0.001, 0.001),  # of a sequence and decode step on the host, where nothing hides it: pipelines
    "eager_us": Prior(0.001, 0.001),  # of a layer on the GPU between kernels that no graph holds, beyond layer_us
    "python_us": Prior(0.001, 0.001),  # of its own code on the host around the launch of a kernel that no graph holds
    "layer_passes": Prior(10, 0.001),  # over the residual stream in a layer: norms, residual sums, rotary, router
}
# Our own engine where its kernels were measured by themselves: they are what runs, in graphs, ahead of the host.
OWN: dict[str, Prior] = {
    **SYSTEM,
    "kernels": Prior(1.0, 0.03),
    "expert_flops": Prior(1.0, 0.02),
    "waiting": Prior(1.1, 0.05),
    "imbalance": Prior(1.0, 0.01),
    "layer_us": Prior(5, 0.4),  # between kernels of a graph
    "step_us": Prior(50, 0.7),  # the next step is made up meanwhile: what is left are its numbers and the choice
    "layer_passes": Prior(1, 0.7),
    "pipeline": Prior(0.95, 0.05, 1.0),
    "prefill": Prior(1.04, 0.04),  # long arithmetic lowers the clocks: 1.01 to 1.10 in docs/benchmarks.md
    "first_us": Prior(1500, 0.7),
    "eager_us": Prior(15, 1.0),
    "python_us": Prior(50, 0.3),  # with a launch of 60: 65 to 143 of five hosts in profiles of a prefill layer
    "sequence_us": Prior(5, 0.7),  # a pipeline makes up a step when the tokens are back (engine/options.py, ahead)
}


def systems(calibration: Calibration) -> list[str]:
    """Serving systems that constants were fitted to, and those that take what all of these have in common."""
    prefix = "end_to_end/serving/"
    fitted = {key.removeprefix(prefix) for key in calibration.fitted if key.startswith(prefix)}
    return sorted(fitted | {"soloist", "vllm", "sglang", "tensorrt"})


class Runtime(Spec, frozen=True, kw_only=True):
    """A serving system's constants, with the typical error of predictions made with them."""

    name: str
    constants: dict[str, float]
    band: float = UNMEASURED

    def __getitem__(self, key: str) -> float:
        """The guess of all systems for a constant that an older calibration does not have."""
        return self.constants.get(key, SYSTEM[key].guess)

    @classmethod
    def named(cls, name: str, calibration: Calibration) -> Runtime:
        """A system of the calibration; what all systems have in common where it is not in there.

        Pipeline losses are not carried over: they are a matter of how one engine schedules.
        """
        if calibration.has(f"runs/{name}"):
            own = calibration.find("runs", name).fitted
            constants = {key: prior.guess for key, prior in OWN.items()} | own.constants
            return cls(name=name, constants=constants, band=own.band)
        if library_of(name, calibration) == name:
            return cls.assumed(name, OWN)
        if "end_to_end/serving" not in calibration.fitted:
            return cls.assumed(name)
        found = calibration.find("end_to_end", "serving", name)
        constants = found.constants if found.exact else {**found.constants, "pipeline": SYSTEM["pipeline"].guess}
        return cls(name=name, constants=constants, band=found.fitted.band)

    @classmethod
    def assumed(cls, name: str, priors: Mapping[str, Prior] = SYSTEM) -> Runtime:
        """The priors."""
        return cls(name=name, constants={key: prior.guess for key, prior in priors.items()})
