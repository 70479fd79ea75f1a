"""Where cases run: plain programs on threads or on MPI's ranks, mpitp's layers under mpirun, torch on gloo ranks."""
import os
import pickle
import shutil
import subprocess
import sys
import time
from pathlib import Path

from case import Case
from plain import Setting
from problems import Program, make
from ranks import MPIRanks, simulate

HERE = Path(__file__).resolve().parent


class PlainHost:
    """Threads of this process; under mpirun for all cases together if it is asked for."""
    name = "plain"

    def cases(self) -> list[Case]:
        from plain_cases import mistake
        return list(mistake)

    def program(self, case: Case, folder: Path) -> Program:
        """Return the program of a case."""
        setting = Setting(dtype=case.dtype, sequence_parallel=case.sequence_parallel, options=dict(case.options))
        sizes = dict(case.sizes)
        problem = make(case.kind, seed=sum(map(ord, case.name)), setting=setting, **sizes)
        return Program(case.code, problem, setting, str(folder), case.tokens)

    def make(self, case: Case, ranks: int, folder: Path) -> None:
        """Write the dump of a case."""
        simulate(ranks, self.program(case, folder))

    def work(self, cases: list[Case], folder: Path) -> None:
        """Write the dumps of cases on the ranks of MPI."""
        comm = MPIRanks()
        for case in cases:
            self.program(case, dump_of(folder, case, comm.size))(comm)


class MPIHost(PlainHost):
    """mpitp's layers, which need ranks of MPI: one job for each number of ranks."""
    name = "mpitp"

    def cases(self) -> list[Case]:
        from mpitp_cases import mistake
        return list(mistake)

    def make(self, case: Case, ranks: int, folder: Path) -> None:
        raise subprocess.CalledProcessError(1, "mpirun", stderr="no dump was written")

    def work(self, cases: list[Case], folder: Path) -> None:
        from mpitp_cases import run
        for case in cases:
            run(case, folder)


class TorchHost(MPIHost):
    """torch.distributed on gloo, each number of ranks a job of its own."""
    name = "torch"

    def cases(self) -> list[Case]:
        from torch_cases import mistake
        return list(mistake)

    def work(self, cases: list[Case], folder: Path) -> None:
        from torch_cases import run
        for case in cases:
            run(case, folder)


HOSTS = {host.name: host for host in (PlainHost(), MPIHost(), TorchHost())}


def cases_of(torch: bool) -> list[Case]:
    """Return the cases of all hosts, torch's if they are asked for."""
    return [case for name, host in HOSTS.items() if name != "torch" or torch for case in host.cases()]


def dump_of(folder: Path, case: Case, ranks: int) -> Path:
    """Return where the dump of a case on so many ranks is."""
    return folder / f"{case.host}-{case.identity}-{ranks}"


def dump_cases(cases: list[Case], folder: Path, on_mpi: bool) -> dict[str, float]:
    """Run the cases that need jobs. Returns {host: seconds for each of its cases}."""
    seconds = {}
    for name in HOSTS:
        mine = [case for case in cases if case.host == name]
        if not mine or name == "plain" and not on_mpi:
            continue
        start = time.perf_counter()
        for ranks in sorted({ranks for case in mine for ranks in case.ranks}):
            launch(name, ranks, [case for case in mine if ranks in case.ranks], folder)
        seconds[name] = (time.perf_counter() - start) / len(mine)
    return seconds


def launch(host: str, ranks: int, cases: list[Case], folder: Path) -> None:
    """Start a job whose ranks write the dumps of cases."""
    names = folder / "cases.pickle"
    names.write_bytes(pickle.dumps([case.identity for case in cases]))
    worker = [sys.executable, str(HERE / "hosts.py"), host, str(names), str(folder)]
    environment = {**os.environ, "PYTHONPATH": f"{HERE.parent.parent}:{os.environ.get('PYTHONPATH', '')}"}
    if host == "torch":
        start_gloo(worker, ranks, environment)
        return
    beside = Path(sys.prefix) / "bin" / "mpirun"
    mpirun = str(beside) if beside.exists() else shutil.which("mpirun") or "mpirun"
    clean = {key: value for key, value in environment.items() if not key.startswith(("PMI", "PMIX", "HYDRA", "HYDI"))}
    clean.update(PRTE_MCA_rmaps_default_mapping_policy=":oversubscribe", OMPI_MCA_rmaps_base_oversubscribe="1")
    done = subprocess.run([mpirun, "-n", str(ranks), *worker], env=clean, capture_output=True, text=True, timeout=240)
    if done.returncode:
        sys.stderr.write(done.stderr[-3000:])


def start_gloo(worker: list[str], ranks: int, environment: dict[str, str]) -> None:
    """Start processes that find each other by the environment, as torchrun does."""
    common = {**environment, "WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29511",
              "OMP_NUM_THREADS": "1"}
    jobs = [subprocess.Popen(worker, env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                             stderr=subprocess.PIPE, text=True) for rank in range(ranks)]
    for job in jobs:
        error = job.communicate(timeout=280)[1]
        if job.returncode:
            sys.stderr.write(error[-3000:])


def main() -> None:
    """Be one rank of a job: host, file of cases, folder of dumps."""
    name, names, folder = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    wanted = set(pickle.loads(names.read_bytes()))
    host = HOSTS[name]
    host.work([case for case in host.cases() if case.identity in wanted], folder)


if __name__ == "__main__":
    main()
