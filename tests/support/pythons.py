"""Write down what .ci/versions has run: python pythons.py FILE RANKS, by the Python that ran the tests."""
import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path


def main(file, ranks):
    path = Path(file)
    found = json.loads(path.read_text()) if path.exists() else {"schema": "mpitp.pythons/1", "ran": []}
    found["ran"].append({"python": platform.python_version(), "ranks": [int(P) for P in ranks.split()],
                         **{name: version(name) for name in ("numpy", "mpi4py", "mpich")}})
    path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
