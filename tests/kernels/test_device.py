import pytest
import torch

from soloist.kernels.device import generation, processors


def test_a_cpu_has_one_processor_and_no_generation() -> None:
    cpu = torch.device("cpu")
    assert (processors(cpu), generation(cpu)) == (1, 0)


@pytest.mark.gpu
def test_a_gpu_tells_of_itself() -> None:
    found = torch.cuda.get_device_properties(0)
    assert (processors(torch.device("cuda", 0)), generation(torch.device("cuda", 0))) == (
        found.multi_processor_count,
        found.major,
    )
