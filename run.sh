#!/usr/bin/env bash
# Run mpitp on several MPI ranks, on a laptop or inside a batch job.
usage() {
    cat <<'TEXT'
./run.sh [-n P] [COMMAND ARGUMENTS...]     mpirun -n P python -m mpitp COMMAND ARGUMENTS...
./run.sh [-n P] PROGRAM.py ARGUMENTS...    the same launcher for a program of your own
./run.sh test [P...]                       the test-suite on each number of ranks (1 2 3 4)
./run.sh --prepare                         install what all of these need, run nothing (login nodes)

P is 2, or inside a Slurm, PBS, LSF or Grid Engine job what was allocated. COMMAND is verify;
./run.sh -n 1 --help lists all. The first use makes .venv beside this script (needs a network);
after --prepare no use needs one. It takes the MPI on PATH if a job of two ranks proves that mpi4py
uses the same library, else one from PyPI (MPICH) in .venv.

  MPITP_VENV=DIR       use this virtual environment and install nothing
  MPITP_LAUNCHER="..." start ranks with these words as they stand, and -n P behind them only where
                       -n P is given: MPITP_LAUNCHER="flux run -n 4" ./run.sh verify
  MPI4PY_LIBMPI=FILE   the MPI library that mpi4py shall use
  PYTHON=FILE          the Python (3.10 or newer) that .venv is made with
  MPITP_PROGRESS=0     no progress bars; 1: bars. By default there are some in a terminal alone
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
prepare=
while [ $# -gt 0 ]; do
    case $1 in
        -n) [ $# -gt 1 ] || die "found -n without a number, expected ranks: -n 4"
            ranks=$2; shift 2 ;;
        -h|--help) [ -z "$ranks" ] || break         # after -n P it is a question to mpitp
            usage; exit 0 ;;
        --prepare) [ $# = 1 ] || die "found --prepare with '${*:2}', expected it alone"
            prepare=yes; shift ;;
        *) break ;;
    esac
done
case $ranks in *[!0-9]*|0) die "found -n '$ranks', expected a number of ranks from 1 on" ;; esac

given=$ranks
crosses_hosts=      # whether Open MPI may start ranks on other hosts
# A rank cannot see this terminal: MPICH gives it pipes, and Open MPI gives rank 0 a pseudo-terminal even for a file.
if [ -t 1 ] && [ -t 2 ]; then MPITP_PROGRESS=${MPITP_PROGRESS:-1}; fi
export MPITP_PROGRESS=${MPITP_PROGRESS:-0}
[ -n "${MPI4PY_LIBMPI:-}" ] || unset MPI4PY_LIBMPI      # mpi4py looks for a library of no name

# --- the batch system: ranks and launcher of the allocation --------------------------------------------
slurm_cpus() {  # how many the job has: SLURM_JOB_CPUS_PER_NODE is such as 4(x2),2
    local part total=0
    for part in $(echo "${SLURM_JOB_CPUS_PER_NODE:-}" | tr , ' '); do
        case $part in
            *"(x"*")") part=${part%")"}; total=$((total + ${part%%"("*} * ${part##*"(x"})) ;;
            *) total=$((total + part)) ;;
        esac
    done
    echo "$total"
}

require_room() {    # $1 ranks at most, ask for more by $2
    [ "$1" -eq 0 ] || [ "$ranks" -le "$1" ] ||
        die "found -n $ranks in a $site allocation of $1, expected at most $1, or a larger allocation: $2"
}

site=
launcher=
flags=()
if [ -n "$prepare" ] || [ -n "${MPITP_LAUNCHER:-}" ]; then
    :
elif [ -n "${SLURM_JOB_ID:-}" ] && command -v srun >/dev/null; then
    site=Slurm launcher=$(command -v srun)
    ranks=${ranks:-${SLURM_NTASKS:-$(( ${SLURM_NNODES:-1} * ${SLURM_NTASKS_PER_NODE:-1} ))}}
    cpus=$(slurm_cpus) per_rank=${SLURM_CPUS_PER_TASK:-}
    require_room "$cpus" "--ntasks=$ranks"
    if [ "$cpus" -gt 0 ] && [ $((ranks * ${per_rank:-1})) -gt "$cpus" ]; then   # -n 4 in an allocation of 1 x 4 cores
        per_rank=$((cpus / ranks))
    fi
    # From Slurm 22.05 on srun does not take this over from sbatch by itself.
    [ -z "$per_rank" ] || flags=(--cpus-per-task="$per_rank")
    # In the shell of srun --pty, which has all of the allocation, another step would wait for ever for a share of it.
    case ${SLURM_STEP_ID:-} in ''|*[!0-9]*|429496729?) ;; *) export SLURM_OVERLAP=1 ;; esac
elif [ -n "${PBS_JOBID:-}" ] && [ -r "${PBS_NODEFILE:-}" ]; then
    site=PBS launcher=$(command -v mpiexec || command -v mpirun || true)
    slots=$(grep -c . "$PBS_NODEFILE" || true)
    ranks=${ranks:-$slots}
    # Without mpiprocs the file names each chunk once, however many cores it has.
    [ "${NCPUS:-0}" -le "$slots" ] || slots=$NCPUS
    require_room "$slots" "qsub -l select=1:ncpus=$ranks:mpiprocs=$ranks"
elif [ -n "${LSB_JOBID:-}" ]; then
    site=LSF launcher=$(command -v jsrun || command -v mpirun || command -v mpiexec || true)
    hosts=(${LSB_HOSTS:-})
    slots=${LSB_DJOB_NUMPROC:-${#hosts[@]}}
    ranks=${ranks:-$slots}
    [ "$ranks" -gt 0 ] || ranks=1
    require_room "$slots" "bsub -n $ranks"
elif [ -n "${NSLOTS:-}" ] && [ -r "${PE_HOSTFILE:-}" ]; then
    site="Grid Engine" launcher=$(command -v mpirun || command -v mpiexec || true)
    ranks=${ranks:-$NSLOTS}
    require_room "$NSLOTS" "qsub -pe NAME $ranks"
fi
ranks=${ranks:-2}
[ -z "$site" ] || [ -n "$launcher" ] ||
    die "found no MPI launcher on PATH inside a $site job, expected the site's: load its MPI module"

# --- .venv ----------------------------------------------------------------------------------------------
make_venv() {
    local base= candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10 python}; do
        if "$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
            base=$candidate; break
        fi
    done
    [ -n "$base" ] ||
        die "found no Python 3.10 or newer with venv (${PYTHON:-python3 on PATH}), expected one: set PYTHON"
    case $here in *:*) die "found a colon in $here, expected a folder without one for .venv, or MPITP_VENV" ;; esac
    echo "run.sh: first use, making $venv" >&2
    rm -rf "$venv"
    "$base" -m venv "$venv"
}

install() {     # into .venv, the project as it lies here
    # A compute node often has no network, and its time costs. By variables, since pip runs itself for what builds.
    local patience="env PIP_RETRIES=${PIP_RETRIES:-1} PIP_DEFAULT_TIMEOUT=${PIP_DEFAULT_TIMEOUT:-8}"
    $patience "$python" -m pip install --quiet --disable-pip-version-check "$@" 2> "$venv/pip.log" || {
        ! grep -qE 'NewConnectionError|ConnectTimeout|ReadTimeout|ProxyError|name resolution' "$venv/pip.log" ||
            die "found no package index that answers $(uname -n), expected a network for what is not in $venv yet:" \
                "./run.sh --prepare where there is one, such as a login node"
        grep -v '^WARNING' "$venv/pip.log" >&2 || true
        die "pip could not install $*, see above; where there is a network, such as a login node: ./run.sh --prepare"
    }
    # A folder named mpitp, such as this clone seen from its parent, would hide an editable installation, but no path.
    "$python" -c 'import sys, sysconfig
open(sysconfig.get_path("purelib") + "/mpitp-here.pth", "w").write(sys.argv[1])' "$here"
}

with_lock() {   # two first uses at once: the second waits for the first
    local lock=$here/.venv.lock owner waited=0
    until mkdir "$lock" 2>/dev/null; do
        [ -d "$here" ] && [ -w "$here" ] ||
            die "found no way to write $here, expected a writable folder for .venv, or MPITP_VENV"
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
extras=threads,progress
[ -z "$prepare" ] || extras=$extras,test
update_venv() {
    [ "$(cat "$venv/mpitp-installed" 2>/dev/null)" = "$installed" ] && return
    if [ -e "$venv/mpitp-installed" ] && [ -x "$python" ]; then
        echo "run.sh: setup.cfg has changed, installing again" >&2
    else
        make_venv
    fi
    install -e "$here[$extras]"
    echo "$installed" > "$venv/mpitp-installed"
}
if [ -z "${MPITP_VENV:-}" ] && [ -L "$python" ] && [ ! -x "$python" ] && [ ! -O "$venv" ]; then
    die "found $python, whose Python $(readlink "$python") this user cannot run, expected one that all may run:" \
        "remove $venv and set PYTHON, or name an environment of yours in MPITP_VENV"
fi
if [ -n "${MPITP_VENV:-}" ]; then
    [ -z "$prepare" ] || die "found --prepare with MPITP_VENV, expected one of them: run.sh installs into .venv alone"
    [ -x "$python" ] || die "found no $python, expected a virtual environment in MPITP_VENV"
elif [ ! -x "$python" ] || [ "$(cat "$venv/mpitp-installed" 2>/dev/null)" != "$installed" ]; then
    with_lock update_venv
elif [ -n "$prepare" ]; then
    with_lock install -e "$here[$extras]"
fi

# --- the MPI: proved by a job, remembered ----------------------------------------------------------------
said=           # what the launcher and the ranks wrote when a proof failed
mpi_type=       # of srun --mpi=TYPE, where srun needs to be told
proves() {      # whether this launcher starts one world of $1 ranks with the library in MPI4PY_LIBMPI, if set
    local limit= text
    command -v timeout >/dev/null && limit="timeout 60"
    text=$(share_cores
        MPIEXEC_TIMEOUT=60 $limit "$launcher" ${flags[@]+"${flags[@]}"} ${mpi_type:+--mpi=$mpi_type} -n "$1" \
        "$python" -c "from mpi4py import MPI; size, name = MPI.COMM_WORLD.size, MPI.get_vendor()[0]
raise SystemExit(size != $1 and f'{name}: a world of {size} rank, expected $1')" 2>&1 </dev/null) && return
    [ -z "$text" ] || said=$text
    return 1
}

vendor() {      # of the MPI that mpi4py loads, which need not start: MPICH, Open MPI, Intel MPI, ...
    "$python" -c "import mpi4py; mpi4py.rc.initialize = False
from mpi4py import MPI; print(MPI.get_vendor()[0])" 2>/dev/null || echo unknown
}

mpi_types() {   # of those that srun --mpi=list shows, the ones that start the MPI of mpi4py, the best first
    local listed type
    listed=" $("$launcher" --mpi=list 2>&1 </dev/null | tr -s ' \t\n,:' ' ' || true) "
    case $(vendor) in
        "Open MPI") set -- pmix pmix_v5 pmix_v4 pmix_v3 pmix_v2 ;;
        Cray*) set -- cray_shasta pmi2 pmix ;;
        *) set -- pmi2 pmix ;;
    esac
    for type in "$@"; do case $listed in *" $type "*) echo "$type" ;; esac; done
}

works() {       # whether two ranks find each other; under srun with whichever --mpi does it
    mpi_type=
    proves 2 && return
    [ "$site" = Slurm ] || return 1
    for mpi_type in $(mpi_types); do
        proves 2 && return
    done
    mpi_type=
    return 1
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
    local version
    version=$("$launcher" --version 2>&1 </dev/null || true)
    case $version in
        *"Open MPI"*" 4."*) echo openmpi4 ;;
        *"Open MPI"*|*OpenRTE*|*prte*|*PRRTE*) echo openmpi5 ;;
        *HYDRA*|*Intel*) echo hydra ;;
        *) echo other ;;
    esac
}

has_settings() {    # whether files or variables give Open MPI hosts of its own, or files a setting of a name like $1
    local prefix etc file
    [ -z "${OMPI_MCA_orte_default_hostfile:-}${OMPI_MCA_default_hostfile:-}" ] || return 0
    [ -z "${PRTE_MCA_prte_default_hostfile:-}${PRTE_MCA_default_hostfile:-}" ] || return 0
    prefix=$(cd "$(dirname "$launcher")/.." && pwd)
    for etc in "$prefix"/etc "$prefix"/etc/openmpi /etc/openmpi; do
        for file in "$etc"/openmpi-default-hostfile "$etc"/prte-default-hostfile; do
            ! grep -qs '^[[:space:]]*[^#[:space:]]' "$file" || return 0
        done
    done
    for file in "${HOME:-}"/.openmpi/mca-params.conf "${HOME:-}"/.prte/mca-params.conf \
                "$prefix"/etc/*-mca-params.conf "$prefix"/etc/openmpi/*-mca-params.conf \
                /etc/openmpi/*-mca-params.conf; do
        ! grep -qsE "^[[:space:]]*($1)[[:space:]]*=[[:space:]]*[^^[:space:]]" "$file" || return 0
    done
    return 1
}

share_cores() {     # more ranks of Open MPI than cores
    export OMPI_MCA_rmaps_base_oversubscribe=${OMPI_MCA_rmaps_base_oversubscribe:-1}
    export PRTE_MCA_rmaps_default_mapping_policy=${PRTE_MCA_rmaps_default_mapping_policy:-:oversubscribe}
}

open_mpi_environment() {    # what Open MPI needs as root, on one node, and to leave ranks unpinned
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    export OMPI_MCA_hwloc_base_binding_policy=${OMPI_MCA_hwloc_base_binding_policy:-none}
    export PRTE_MCA_hwloc_default_binding_policy=${PRTE_MCA_hwloc_default_binding_policy:-none}
    local cores
    cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
    if [ -z "$site" ] && [ "$ranks" -gt "$cores" ]; then    # a rank that waits lets another work
        export OMPI_MCA_mpi_yield_when_idle=${OMPI_MCA_mpi_yield_when_idle:-1}
    fi
    if [ -z "$site" ] && ! has_settings '[a-z_]*hostfile'; then
        share_cores                                         # with more hosts it would put all ranks on the first one
    fi
    if [ -z "$site" ] && ! has_settings 'pml|btl|[a-z_]*hostfile'; then
        # One node: opening the network takes a second.
        local shared=sm
        [ "$1" != openmpi4 ] || shared=vader
        export OMPI_MCA_pml=${OMPI_MCA_pml:-ob1} OMPI_MCA_btl=${OMPI_MCA_btl:-self,$shared}
    fi
}

other_hosts() {     # Open MPI's mpirun gives the ranks of other hosts no variables but its own (measured)
    [ -n "$site" ] || has_settings '[a-z_]*hostfile' || return 0
    crosses_hosts=yes
    # Where a link is cut, its keepalive would end the job with status 0 before mpitp says who is missing (measured).
    export PRTE_MCA_oob_tcp_keepalive_time=${PRTE_MCA_oob_tcp_keepalive_time:-7200}
    export OMPI_MCA_oob_tcp_keepalive_time=${OMPI_MCA_oob_tcp_keepalive_time:-7200}
    local name
    for name in $(compgen -e); do
        case $name in
            MPITP_*|MPI4PY_*|PYTHON*|OMP_*|OPENBLAS_*|MKL_*|BLIS_*|CUPY_*|NCCL_*) flags+=(-x "$name") ;;
        esac
    done
}

add_mpich() {
    [ ! -x "$venv/bin/mpirun" ] || return 0
    [ -z "${MPITP_VENV:-}" ] || die "found no mpirun that mpi4py in $venv belongs to, expected one on PATH or in it"
    echo "run.sh: ${launcher:+$launcher is not of a library that mpi4py can use; }installing MPICH into .venv" >&2
    install -e "$here[mpi]"
}

grid_engine_hosts() {   # an Open MPI without Grid Engine support would start every rank on this node
    local file=${TMPDIR:-/tmp}/mpitp-hosts.${JOB_ID:-$$}
    awk 'NF > 1 { print $1 " slots=" $2 }' "$PE_HOSTFILE" > "$file"
    flags=(-machinefile "$file")
}

choose_mpi() {
    local key memory=$venv/mpitp-mpi${site:+-${site// /-}} found= library= is= remembered=
    [ -n "$launcher" ] || launcher=$(command -v mpirun || command -v mpiexec || true)
    key="$launcher $(ls -lLd "$launcher" 2>/dev/null || true)"
    key="$key ${MPI4PY_LIBMPI:-} ${LD_LIBRARY_PATH:-} ${SLURM_MPI_TYPE:-}"
    if [ -r "$memory" ] && { IFS= read -r found; IFS= read -r library; IFS= read -r is; IFS= read -r mpi_type
                             IFS= read -r remembered; } < "$memory" &&
       [ "$remembered" = "$key" ] && [ -x "$found" ]; then
        :
    else
        found= library=${MPI4PY_LIBMPI:-} is=other mpi_type=
        if [ -n "$launcher" ]; then
            is=$(kind)
            case $is in openmpi*) open_mpi_environment "$is" ;; esac
            if [ -n "$site" ] && [ "$ranks" = 1 ]; then return; fi      # nothing to prove, nothing to remember
            if works; then
                found=$launcher
            elif [ -z "$library" ]; then
                while read -r library; do
                    if MPI4PY_LIBMPI=$library works; then found=$launcher; break; fi
                done < <(libraries | awk '!seen[$0]++')
                [ -n "$found" ] || library=
            fi
        fi
        if [ -z "$found" ] && [ -n "$site" ]; then
            [ -z "$said" ] || printf '%s\n' "$said" | tail -n 4 | sed 's/^/    /' >&2
            no_world
        elif [ -z "$found" ]; then
            [ -z "${MPI4PY_LIBMPI:-}" ] || no_launcher_of "$MPI4PY_LIBMPI"
            # Under the lock even when there is an mpirun: another first use may be in the middle of installing it.
            if [ -n "${MPITP_VENV:-}" ] || [ ! -w "$here" ]; then add_mpich; else with_lock add_mpich; fi
            found=$venv/bin/mpirun
            launcher=$found
            is=$(kind)
        fi
        [ -z "$mpi_type" ] || echo "run.sh: this MPI needs srun --mpi=$mpi_type, which is remembered" >&2
        printf '%s\n' "$found" "$library" "$is" "$mpi_type" "$key" > "$memory.$$" 2>/dev/null &&
            mv "$memory.$$" "$memory" || true
    fi
    launcher=$found
    [ -z "$library" ] || export MPI4PY_LIBMPI=$library
    [ -z "$mpi_type" ] || flags+=(--mpi="$mpi_type")
    case $is in openmpi*) open_mpi_environment "$is" ;; esac
    # An Open MPI without PBS support would start every rank on this node.
    case $site$is in
        PBSopenmpi*) flags=(-machinefile "$PBS_NODEFILE") ;;
        "Grid Engineopenmpi"*) grid_engine_hosts ;;
    esac
    case $is in openmpi*) other_hosts ;; esac
}

no_launcher_of() {      # $1 the library that the user named
    [ -z "$said" ] || printf '%s\n' "$said" | tail -n 2 | sed 's/^/    /' >&2
    [ "$(vendor)" != unknown ] || die "found MPI4PY_LIBMPI=$1, which mpi4py cannot load, expected an MPI: .../libmpi.so"
    [ -n "$launcher" ] || die "found no mpirun on PATH, expected that of MPI4PY_LIBMPI=$1: export PATH=.../bin:\$PATH"
    die "found $launcher, which starts no world of two ranks with MPI4PY_LIBMPI=$1," \
        "expected the mpirun of that library first on PATH: export PATH=.../bin:\$PATH"
}

no_world() {    # nothing works inside a job: what was tried, and the ways out
    local name tried= types
    name=$(vendor)
    [ "$name" != unknown ] || die "found no MPI library that mpi4py in $venv can load, expected the $site site's:" \
        "load its MPI module, or set MPI4PY_LIBMPI to its libmpi.so"
    if [ "$site" = Slurm ]; then
        types=$(mpi_types | tr '\n' ' ')
        tried=" (--mpi tried: its default${types:+, ${types% }})"
    fi
    die "found no world of two ranks with mpi4py's $name under $launcher$tried, expected the MPI of the $site site:" \
        "set MPI4PY_LIBMPI to its libmpi.so, or build mpi4py with the site's mpicc" \
        "(pip install --no-binary mpi4py mpi4py) in a virtual environment named by MPITP_VENV"
}

if [ -n "${MPITP_LAUNCHER:-}" ]; then
    read -ra start <<< "$MPITP_LAUNCHER"
    command -v "${start[0]:-}" >/dev/null ||
        die "found no program '${start[0]:-}', expected in MPITP_LAUNCHER a launcher and its options"
else
    choose_mpi
    start=("$launcher" ${flags[@]+"${flags[@]}"})
    given=$ranks
fi
if [ -n "$prepare" ]; then
    echo "run.sh: $venv is complete, for $launcher; no use from now on needs a network" >&2
    exit
fi

# MPI libraries die, with a bus error at best, where /dev/shm has no room for the messages on a node. Measured: two to
# four ranks need up to 32 MiB. In a job a node has no more ranks than cores.
here_ranks=$ranks cores=$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1)
if [ -n "$site${MPITP_LAUNCHER:-}" ] && [ "$ranks" -gt "$cores" ]; then here_ranks=$cores; fi
shm=$(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 { print int($4 / 1024) }' || true)
wanted=$((16 + 8 * here_ranks))
if [ -n "$shm" ] && [ "$here_ranks" -gt 1 ] && [ "$shm" -lt $wanted ]; then
    echo "run.sh: found $shm MiB free in /dev/shm of $(uname -n), expected $wanted MiB for $here_ranks ranks," \
        "or the MPI may die: docker run --shm-size=1g, or remount /dev/shm larger" >&2
fi

# --- the end -----------------------------------------------------------------------------------------------
# Open MPI's mpirun says that a rank has ended the job, and waits for the daemons of all hosts: where the link to one is
# cut, for a quarter of an hour (measured). This passes its standard error on, and after such a line ends it.
pass_on='import os, re, signal, sys, threading, time
mpirun, patience, last = int(sys.argv[1]), 20, b""
signal.signal(signal.SIGINT, signal.SIG_IGN)        # it is for mpirun, whose last lines come yet
os.close(1)
def end():
    time.sleep(patience)
    for number, seconds in ((signal.SIGTERM, 3), (signal.SIGKILL, 1)):
        if os.getppid() == mpirun:
            os.write(2, b"run.sh: found mpirun waiting for a host that does not answer, %d s after a rank has ended "
                     b"the job: it gets %s\n" % (patience, number.name.encode()))
            os.kill(mpirun, number)
            time.sleep(seconds)
    os._exit(0)
while text := os.read(0, 65536):
    try:
        os.write(2, text)
    except OSError:
        pass
    last = (last + text)[-4096:]
    if re.search(rb"(exited due to|noticed that) process rank \d+|detected that one or more processes exited", last) and threading.active_count() == 1:
        threading.Thread(target=end, daemon=True).start()'

# --- run -------------------------------------------------------------------------------------------------
if [ "${1:-}" = test ]; then
    shift
    "$python" -c 'import pytest, hypothesis, ml_dtypes, safetensors, threadpoolctl, numpydoc' 2>/dev/null || {
        [ -z "${MPITP_VENV:-}" ] || die "found no pytest and companions in $venv, expected pip install '.[test]'"
        with_lock install -e "$here[test]"
    }
    cd "$here"
    export OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1 MPIEXEC_TIMEOUT="${MPIEXEC_TIMEOUT:-900}"
    for ranks in "${@:-1 2 3 4}"; do
        for P in $ranks; do
            echo "--- $P rank$([ "$P" = 1 ] || echo s): ${start[0]} -n $P python -m pytest tests"
            "${start[@]}" -n "$P" "$python" -m pytest -q tests
        done
    done
    exit
fi
case ${1:-} in
    *.py) set -- -m mpi4py "$@" ;;              # as a program of one's own: an exception ends all ranks
    *) set -- -m mpitp "$@" ;;
esac
[ -z "$crosses_hosts" ] || exec 2> >(exec "$python" -c "$pass_on" $$)
exec "${start[@]}" ${given:+-n "$given"} "$python" "$@"
