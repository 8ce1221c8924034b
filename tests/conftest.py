"""Eight CPU devices, so that every test can shard."""

import jax

jax.config.update("jax_num_cpu_devices", 8)
