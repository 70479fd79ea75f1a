#!/usr/bin/env bash
# Run mpitp on several MPI ranks, on a laptop or inside a batch job.
usage() {
    cat <<'TEXT'
./run.sh [-n P] [COMMAND ARGUMENTS...]     mpirun -n P python -m mpitp COMMAND ARGUMENTS...
./run.sh [-n P] PROGRAM.py ARGUMENTS...    the same launcher for a program of your own
./run.sh test [P...]                       the test-suite on each number of ranks (1 2 3 4)

P is 2, or inside a Slurm, PBS or LSF job what was allocated. COMMAND is verify; ./run.sh -n 1 --help lists all.
The first use makes .venv beside this script (needs a network); after that none is needed. It takes the MPI on
PATH if a job of two ranks proves that mpi4py uses the same library, else one from PyPI (MPICH) in .venv.

  MPITP_VENV=DIR       use this virtual environment and install nothing
  MPI4PY_LIBMPI=FILE   the MPI library that mpi4py shall use
  PYTHON=FILE          the Python (3.10 or newer) that .venv is made with
  MPITP_PROGRESS=0     no progress bar (1: one, 0 wherever the output is no terminal)
TEXT
}
set -euo pipefail

die() { echo "run.sh: $*" >&2; exit 2; }

# --- where this script is, through symbolic links ------------------------------------------------------
self=${BASH_SOURCE[0]}
while [ -L "$self" ]; do
    link=$(readlink "$self")
    case $link in /*) self=$link ;; *) self=$(dirname "$self")/$link ;; esac
done
here=$(cd "$(dirname "$self")" && pwd)
venv=${MPITP_VENV:-$here/.venv}
python=$venv/bin/python

# --- arguments -----------------------------------------------------------------------------------------
ranks=
while [ $# -gt 0 ]; do
    case $1 in
        -n) [ $# -gt 1 ] || die "found -n without a number, expected ranks: -n 4"
            ranks=$2; shift 2 ;;
        -h|--help) [ -z "$ranks" ] || break         # after -n P it is a question to mpitp
            usage; exit 0 ;;
        *) break ;;
    esac
done
case $ranks in *[!0-9]*|0) die "found -n '$ranks', expected a number of ranks from 1 on" ;; esac

# --- the batch system: ranks and launcher of the allocation --------------------------------------------
site=
launcher=
flags=()
if [ -n "${SLURM_JOB_ID:-}" ] && command -v srun >/dev/null; then
    site=Slurm launcher=$(command -v srun)
    ranks=${ranks:-${SLURM_NTASKS:-$(( ${SLURM_NNODES:-1} * ${SLURM_NTASKS_PER_NODE:-1} ))}}
    # From Slurm 22.05 on srun does not take this over from sbatch by itself.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || flags=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
elif [ -n "${PBS_JOBID:-}" ] && [ -r "${PBS_NODEFILE:-}" ]; then
    site=PBS launcher=$(command -v mpiexec || command -v mpirun || true)
    ranks=${ranks:-$(grep -c . "$PBS_NODEFILE")}
elif [ -n "${LSB_JOBID:-}" ]; then
    site=LSF launcher=$(command -v jsrun || command -v mpirun || command -v mpiexec || true)
    hosts=(${LSB_HOSTS:-})
    ranks=${ranks:-${LSB_DJOB_NUMPROC:-${#hosts[@]}}}
    [ "$ranks" -gt 0 ] || ranks=1
fi
ranks=${ranks:-2}
[ -z "$site" ] || [ -n "$launcher" ] || die "found no MPI launcher on PATH inside a $site job, expected the site's: load its MPI module"

# --- .venv ----------------------------------------------------------------------------------------------
make_venv() {
    local base= candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            base=$candidate; break
        fi
    done
    [ -n "$base" ] || die "found no Python 3.10 or newer with venv (${PYTHON:-python3 on PATH}), expected one: set PYTHON"
    echo "run.sh: first use, making $venv" >&2
    rm -rf "$venv"
    "$base" -m venv "$venv"

}

install() {     # into .venv, the project as it lies here
    "$python" -m pip install --quiet --disable-pip-version-check "$@" 2> "$venv/pip.log" ||
        { grep -v '^WARNING' "$venv/pip.log" >&2 || true; die "pip could not install $*, see above"; }
}

with_lock() {   # two first uses at once: the second waits for the first
    local lock=$here/.venv.lock owner waited=0
    until mkdir "$lock" 2>/dev/null; do
        [ -d "$here" ] && [ -w "$here" ] || die "found no way to write $here, expected a writable folder for .venv, or MPITP_VENV"
        owner=$(cat "$lock/owner" 2>/dev/null || true)
        if [ -n "$owner" ] && ! kill -0 "$owner" 2>/dev/null || [ -z "$owner" ] && [ $waited -gt 5 ]; then
            rm -rf "$lock"; continue                # left behind by a run that was killed
        fi
        sleep 1; waited=$((waited + 1))
    done
    echo $$ > "$lock/owner"
    trap 'rm -rf "$here/.venv.lock"' EXIT
    "$@"
    rm -rf "$lock"; trap - EXIT
}

# .venv is complete when it carries the checksum of the setup.cfg that it was made from.
installed=$(cksum < "$here/setup.cfg")
update_venv() {
    [ "$(cat "$venv/mpitp-installed" 2>/dev/null)" = "$installed" ] && return
    if [ -e "$venv/mpitp-installed" ] && [ -x "$python" ]; then
        echo "run.sh: setup.cfg has changed, installing again" >&2
        install -e "$here[threads,progress]"
    else
        make_venv
        install -e "$here[threads,progress]"
    fi
    echo "$installed" > "$venv/mpitp-installed"
}
if [ -n "${MPITP_VENV:-}" ]; then
    [ -x "$python" ] || die "found no $python, expected a virtual environment in MPITP_VENV"
elif [ ! -x "$python" ] || [ "$(cat "$venv/mpitp-installed" 2>/dev/null)" != "$installed" ]; then
    with_lock update_venv
fi

# --- the MPI: proved by a job, remembered ----------------------------------------------------------------
proves() {      # whether this launcher starts one world of $1 ranks with the library in MPI4PY_LIBMPI, if set
    local limit=
    command -v timeout >/dev/null && limit="timeout 60"
    MPIEXEC_TIMEOUT=60 $limit "$launcher" ${flags[@]+"${flags[@]}"} -n "$1" "$python" -c \
        "from mpi4py import MPI; raise SystemExit(MPI.COMM_WORLD.size != $1)" >/dev/null 2>&1 </dev/null
}

libraries() {   # MPI libraries that may belong to the launcher: beside it, then those of mpicc, then the system's
    local tool prefix
    for tool in "$launcher" mpicc mpirun; do
        tool=$(command -v "$tool") || continue
        while [ -L "$tool" ]; do
            link=$(readlink "$tool")
            case $link in /*) tool=$link ;; *) tool=$(dirname "$tool")/$link ;; esac
        done
        prefix=$(cd "$(dirname "$tool")/.." && pwd)
        ls -d "$prefix"/lib*/libmpi.so.* "$prefix"/lib*/libmpi.*dylib "$prefix"/lib*/*/libmpi.so.* \
              "$prefix"/lib*/libmpich.so.* "$prefix"/lib*/*/libmpich.so.* 2>/dev/null || true
    done
    { ldconfig -p 2>/dev/null || true; } | sed -n 's/.* => \(.*libmpi\(ch\)\{0,1\}\.so\..*\)/\1/p'
}

kind() {        # openmpi4, openmpi5, hydra or other: what the launcher says of itself
    local said
    said=$("$launcher" --version 2>&1 </dev/null || true)
    case $said in
        *"Open MPI"*" 4."*) echo openmpi4 ;;
        *"Open MPI"*|*OpenRTE*|*prte*|*PRRTE*) echo openmpi5 ;;
        *HYDRA*|*Intel*) echo hydra ;;
        *) echo other ;;
    esac
}

open_mpi_environment() {    # what Open MPI needs as root, with more ranks than cores, and to leave ranks unpinned
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    export OMPI_MCA_rmaps_base_oversubscribe=${OMPI_MCA_rmaps_base_oversubscribe:-1}
    export PRTE_MCA_rmaps_default_mapping_policy=${PRTE_MCA_rmaps_default_mapping_policy:-:oversubscribe}
    export OMPI_MCA_hwloc_base_binding_policy=${OMPI_MCA_hwloc_base_binding_policy:-none}
    export PRTE_MCA_hwloc_default_binding_policy=${PRTE_MCA_hwloc_default_binding_policy:-none}
    local cores
    cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
    if [ -z "$site" ] && [ "$ranks" -gt "$cores" ]; then    # a rank that waits lets another work
        export OMPI_MCA_mpi_yield_when_idle=${OMPI_MCA_mpi_yield_when_idle:-1}
    fi
    if [ -z "$site" ]; then                                 # one node: opening the network takes a second
        local shared=sm
        [ "$1" != openmpi4 ] || shared=vader
        export OMPI_MCA_pml=${OMPI_MCA_pml:-ob1} OMPI_MCA_btl=${OMPI_MCA_btl:-self,$shared}
    fi
}

add_mpich() {
    [ ! -x "$venv/bin/mpirun" ] || return 0
    [ -z "${MPITP_VENV:-}" ] || die "found no mpirun that mpi4py in $venv belongs to, expected one on PATH or in it"
    echo "run.sh: ${launcher:+$launcher is not of a library that mpi4py can use; }installing MPICH into .venv" >&2
    install -e "$here[mpi]"
}

choose_mpi() {
    local key memory=$venv/mpitp-mpi found library is
    [ -n "$launcher" ] || launcher=$(command -v mpirun || command -v mpiexec || true)
    key="$launcher $(ls -lLd "$launcher" 2>/dev/null || true) ${MPI4PY_LIBMPI:-} ${LD_LIBRARY_PATH:-} $site"
    if [ -r "$memory" ] && { IFS= read -r found; IFS= read -r library; IFS= read -r is; IFS= read -r remembered; } < "$memory" &&
       [ "$remembered" = "$key" ] && [ -x "$found" ]; then
        :
    else
        found= library=${MPI4PY_LIBMPI:-} is=other
        if [ -n "$launcher" ]; then
            is=$(kind)
            case $is in openmpi*) open_mpi_environment "$is" ;; esac
            if [ -n "$site" ] && [ "$ranks" = 1 ]; then return; fi      # nothing to prove, nothing to remember
            if proves 2; then
                found=$launcher
            elif [ -z "$library" ]; then
                while read -r library; do
                    if MPI4PY_LIBMPI=$library proves 2; then found=$launcher; break; fi
                done < <(libraries | awk '!seen[$0]++')
                [ -n "$found" ] || library=
            fi
        fi
        if [ -z "$found" ] && [ -n "$site" ]; then
            die "found that mpi4py in $venv does not use the MPI of $launcher, expected the $site site's library:" \
                "set MPI4PY_LIBMPI to it, or build mpi4py with the site's mpicc (pip install --no-binary mpi4py mpi4py)" \
                "in a virtual environment named by MPITP_VENV"
        elif [ -z "$found" ]; then
            [ -z "${MPI4PY_LIBMPI:-}" ] || die "found no launcher on PATH for MPI4PY_LIBMPI=$MPI4PY_LIBMPI, expected its mpirun"
            # Under the lock even when there is an mpirun: another first use may be in the middle of installing it.
            if [ -n "${MPITP_VENV:-}" ] || [ ! -w "$here" ]; then add_mpich; else with_lock add_mpich; fi
            found=$venv/bin/mpirun
            launcher=$found
            is=$(kind)
        fi
        printf '%s\n' "$found" "$library" "$is" "$key" > "$memory.$$" 2>/dev/null && mv "$memory.$$" "$memory" || true
    fi
    launcher=$found
    [ -z "$library" ] || export MPI4PY_LIBMPI=$library
    case $is in openmpi*) open_mpi_environment "$is" ;; esac
    # An Open MPI without PBS support would start every rank on this node.
    case $site$is in PBSopenmpi*) flags=(-machinefile "$PBS_NODEFILE") ;; esac
}
choose_mpi

# --- run -------------------------------------------------------------------------------------------------
if [ "${1:-}" = test ]; then
    shift
    "$python" -c 'import pytest, hypothesis, ml_dtypes, safetensors, threadpoolctl' 2>/dev/null || {
        [ -z "${MPITP_VENV:-}" ] || die "found no pytest and companions in $venv, expected pip install '.[test]'"
        with_lock install -e "$here[test]"
    }
    cd "$here"
    export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 MPIEXEC_TIMEOUT="${MPIEXEC_TIMEOUT:-900}"
    for ranks in "${@:-1 2 3 4}"; do
        for P in $ranks; do
            echo "--- $P rank$([ "$P" = 1 ] || echo s): $launcher -n $P python -m pytest tests"
            "$launcher" ${flags[@]+"${flags[@]}"} -n "$P" "$python" -m pytest -q tests
        done
    done
    exit
fi
# A rank cannot see this terminal: MPICH gives it pipes, and Open MPI gives rank 0 a pseudo-terminal even for a file.
if [ -t 1 ] && [ -t 2 ]; then MPITP_PROGRESS=${MPITP_PROGRESS:-1}; fi
export MPITP_PROGRESS=${MPITP_PROGRESS:-0}
case ${1:-} in
    *.py) set -- -m mpi4py "$@" ;;              # as a program of one's own: an exception ends all ranks
    *) set -- -m mpitp "$@" ;;
esac
exec "$launcher" ${flags[@]+"${flags[@]}"} -n "$ranks" "$python" "$@"
