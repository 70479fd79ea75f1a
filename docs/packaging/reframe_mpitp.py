# Tried with ReFrame 4 on one node: its local scheduler, the launcher mpirun, MPICH. A site adds its own system and
# programming environments, and the module that has mpitp:
#
#     reframe -C SITE.py -c docs/packaging/reframe_mpitp.py -r
import reframe as rfm
import reframe.utility.sanity as sn


class MpitpTest(rfm.RunOnlyRegressionTest):
    """`python -m mpitp` on a number of ranks."""

    valid_systems = ["*"]
    valid_prog_environs = ["*"]
    executable = "python"
    ranks = parameter([2, 3])
    time_limit = "10m"
    env_vars = {"OMP_NUM_THREADS": "1"}

    @run_before("run")
    def set_ranks(self):
        self.num_tasks = self.ranks


@rfm.simple_test
class VerifyTest(MpitpTest):
    """Every layer is what the dense oracle says, and costs the collectives that its closed form says."""

    executable_opts = ["-m", "mpitp", "verify", "--all"]

    @sanity_function
    def every_check_holds(self):
        return sn.assert_found(r"^every check holds", self.stdout)


@rfm.simple_test
class SameBitsTest(MpitpTest):
    """Reproducible mode: the checksums do not depend on the number of ranks, but on the type of machine."""

    executable_opts = ["-m", "mpitp", "verify", "--hidden-size", "64", "--reproducible"]
    postrun_cmds = ["mpirun -n 1 python -m mpitp verify --hidden-size 64 --reproducible | grep sha256 > one",
                    "grep sha256 rfm_job.out | diff - one && echo the same bits"]

    @sanity_function
    def same_checksums(self):
        return sn.assert_found(r"^the same bits", self.stdout)
