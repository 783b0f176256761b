"""Where the kernels for Hopper GPUs run."""

import jax

from jaxserve.ops import hopper


def test_it_runs_on_hopper_gpus_with_cuda_13(monkeypatch):
    class Device:
        compute_capability = "9.0"
        core_count = 114

        class client:
            platform_version = "PJRT C API\ncuda 13000"

    monkeypatch.setattr(jax, "devices", lambda: [Device])
    assert hopper.is_supported() and hopper.is_supported(min_sms=114)
    assert not hopper.is_supported(min_sms=132)
    Device.client.platform_version = "PJRT C API\ncuda 12090"
    assert not hopper.is_supported()
    Device.client.platform_version, Device.compute_capability = "cuda 13000", "10.0"
    assert not hopper.is_supported()
