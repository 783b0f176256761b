"""Eight virtual CPU devices for every test, so that mesh tests run anywhere and in any order."""

from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", 8)


def pytest_collection_finish():
    """Starts the backend before a test that runs an engine here asks for another number of devices.

    Not on a machine with a GPU: there the engine sets memory limits first.
    """
    if not Path("/dev/nvidiactl").exists():
        jax.devices()
