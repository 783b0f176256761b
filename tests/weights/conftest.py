"""Eight virtual CPU devices for the mesh tests; jax must not have started yet."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
