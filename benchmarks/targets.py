"""Compiles programs for accelerators that are not there.

A compiler needs to know a device, not to have it: libtpu knows every TPU, and the CUDA
plugin of JAX compiles for the GPU whose facts are in ``h100.txtpb``. Nothing is run.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

# Cheaper code, of as many kernels with as many arrays.
_CUDA_OPTIONS = {
    "xla_gpu_autotune_level": 0,
    "xla_backend_optimization_level": 0,
    "xla_llvm_disable_expensive_passes": True,
    "xla_gpu_disable_gpuasm_optimizations": True,
}


class Target(NamedTuple):
    """A device, or a few of them, to compile for.

    Attributes:
      platform: as JAX names it.
      topology: which devices; None for the CPU of this machine.
    """

    platform: str
    topology: str | None = None

    def devices(self) -> list[Any]:
        """Descriptions of the devices, as a mesh takes them."""
        if self.topology is None:
            return jax.devices("cpu")
        # Or libtpu asks the cloud which machine this is.
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"
        if self.platform == "cuda":
            facts = Path(__file__).with_name("h100.txtpb").read_text()
            described = topologies.get_topology_desc(
                platform=self.platform, topology=self.topology, target_config=facts
            )
        else:
            described = topologies.get_topology_desc(self.topology, self.platform)
        return list(described.devices)

    def mesh(self, shape: tuple[int, ...], names: tuple[str, ...]) -> Mesh:
        """A mesh of the devices."""
        return Mesh(np.array(self.devices()).reshape(shape), names)


TARGETS = {
    "H100": Target("cuda", "1x1x1"),
    "TPU v5e": Target("tpu", "v5e:2x2"),
    "TPU v6e": Target("tpu", "v6e:2x2"),
    "CPU": Target("cpu"),
}


class Compiled(NamedTuple):
    """A program, and the seconds that tracing and compiling it took."""

    program: Any
    seconds: float


def on_one_device(target: Target, tree: Any) -> Any:
    """The shapes of a tree, as arrays on the first device."""
    place = SingleDeviceSharding(target.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree
    )


def compile_for(
    target: Target, step: Callable[..., Any], arguments: tuple, donated: tuple[int, ...]
) -> Compiled:
    """Compiles a step for one device of the target, or where its arguments lie."""
    start = time.perf_counter()
    traced = jax.jit(step, donate_argnums=donated).trace(*arguments)
    lowered = traced.lower(lowering_platforms=(target.platform,))
    options = _CUDA_OPTIONS if target.platform == "cuda" else None
    program = lowered.compile(compiler_options=options)
    return Compiled(program, time.perf_counter() - start)
