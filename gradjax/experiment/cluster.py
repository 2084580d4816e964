"""The processes of one command on a cluster: joining them, and the run folder they share."""

import os
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from gradjax.experiment.schema import ConfigError, Experiment
from gradjax.report import files


def join_cluster() -> bool:
    """Join the other processes of this command, if any; return whether this one is the first.

    The addresses come from JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or from
    Slurm. Call it before anything else of JAX.

    Raises:
      ConfigError: incomplete or inconsistent variables.
    """
    count = os.environ.get("JAX_NUM_PROCESSES")
    if count:
        address, index = os.environ.get("JAX_COORDINATOR_ADDRESS"), os.environ.get("JAX_PROCESS_ID")
        are_numbers = count.isdigit() and (index or "").isdigit()
        if not address or not index or not are_numbers or int(index) >= int(count):
            raise ConfigError(
                f"sweep: JAX_NUM_PROCESSES = {count!r} with JAX_COORDINATOR_ADDRESS = {address!r} "
                f"and JAX_PROCESS_ID = {index!r}; needed: host:port, and an index below the count"
            )
        jax.distributed.initialize(address, int(count), int(index))
    elif int(os.environ.get("SLURM_NTASKS", "1")) > 1 and "SLURM_PROCID" in os.environ:
        jax.distributed.initialize()
    return jax.process_index() == 0


def agree_on_folder(experiment: Experiment, resume: bool) -> Path:
    """The run folder, which the first process chooses for all: the newest unfinished, or a new one.

    Args:
      experiment: gives output and name.
      resume: whether an unfinished folder of that name is taken up again.
    """
    chosen = None
    if jax.process_index() == 0:
        if resume:
            chosen = files.unfinished(experiment.output, experiment.name)
        chosen = chosen or files.run_folder(experiment.output, experiment.name)
    if jax.process_count() == 1:
        assert chosen is not None
        return chosen
    text = np.zeros(4096, np.uint8)
    name = str(chosen or "").encode()
    text[: len(name)] = np.frombuffer(name, np.uint8)
    agreed = np.asarray(multihost_utils.broadcast_one_to_all(text))
    return Path(bytes(agreed[agreed > 0].astype(np.uint8)).decode())
