r"""Run a sweep on a Slurm cluster, several processes side by side, requeued when it is preempted.

    python scripts/sweep_slurm.py configs/clip_threshold.toml --processes 8 --gpus 1 \
      --minutes 240 --partition gpu
    # on this machine
    python scripts/sweep_slurm.py configs/clip_threshold.toml --processes 2 --local

Every process runs `gradjax sweep CONFIG --resume`: finished blocks are skipped, and one that was
interrupted continues from its checkpoint, with the same bits. Copy the script and change what your
cluster needs (account, constraint, container).
"""

import os
import socket
import sys
from dataclasses import dataclass

import submitit
import tyro


@dataclass(frozen=True)
class Sweep:
    """One process of the sweep.

    submitit pickles it, runs it, and asks `checkpoint` what to do after a preemption.
    """

    args: tuple[str, ...]
    port: int = 0

    def __call__(self) -> int:
        """Join the other processes and run the command line."""
        task = submitit.JobEnvironment()
        if task.num_tasks > 1:
            os.environ["JAX_COORDINATOR_ADDRESS"] = f"{task.hostnames[0]}:{self.port}"
            os.environ["JAX_NUM_PROCESSES"] = str(task.num_tasks)
            os.environ["JAX_PROCESS_ID"] = str(task.global_rank)
        from gradjax.cli.main import main

        status = main(["sweep", *self.args, "--resume"])
        if status:
            raise SystemExit(status)
        return status

    def checkpoint(self) -> submitit.helpers.DelayedSubmission:
        """Again with the same arguments: the run folder knows how far it is."""
        return submitit.helpers.DelayedSubmission(self)


def free_port() -> int:
    """A port that nobody uses now on this machine."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


@dataclass(frozen=True)
class Job:
    """Submit `gradjax sweep CONFIG` and wait for it."""

    config: tyro.conf.Positional[str]
    """TOML file with a [sweep]; see configs/."""
    flags: tuple[str, ...] = ()
    """Flags for the sweep, as in `--flags=--train.num_seeds=64`."""
    processes: int = 1
    """Processes; the blocks are shared out between them."""
    gpus: int = 0
    """GPUs per process."""
    cpus: int = 2
    """CPU cores per process."""
    minutes: int = 60
    """Time limit; an unfinished process is requeued then."""
    partition: str = ""
    """Slurm's partition; empty: its default."""
    logs: str = "runs/slurm"
    """Folder of the jobs' logs; every node must see it."""
    local: bool = False
    """On this machine, without Slurm."""


def submit(job: Job) -> submitit.Job:
    """Submit a job and return submitit's handle."""
    executor = submitit.AutoExecutor(folder=job.logs, cluster="local" if job.local else "slurm")
    executor.update_parameters(
        name="gradjax",
        tasks_per_node=job.processes,
        nodes=1,
        cpus_per_task=job.cpus,
        timeout_min=job.minutes,
        **({"gpus_per_node": job.gpus * job.processes} if job.gpus else {}),
        **({"slurm_partition": job.partition} if job.partition else {}),
    )
    # on a cluster the port is only probably free there; it is drawn anew for every submission
    return executor.submit(Sweep((job.config, *job.flags), free_port()))


def main() -> int:
    """Command line."""
    handle = submit(tyro.cli(Job, description=__doc__))
    print(f"job {handle.job_id}, logs in {handle.paths.folder}")
    handle.results()
    return 0


if __name__ == "__main__":
    sys.exit(main())
