"""One token after the other, of Gemma 3 270M or another checkpoint: against bare products, and transformers on torch.

    pip install '.[mpi,text]' torch transformers
    python benchmarks/decode.py --model DIR [--starts 3] [--out benchmarks/results] [--torch-python PYTHON]
    python benchmarks/decode.py --model DIR --before TREE [--starts 9]

Starts processes of both kinds in turn, each with the machine for itself, as a machine may be in another memory state
from process to process. DIR is a folder saved from the Hugging Face hub; float32, --ranks ranks against as many
threads.
Rows, each a median over the starts of the median within a start:
  bare         every weight of a rank times a vector, in the same processes as mpitp decodes: the limit
  decode       one token, keys and values kept, greedy
  prefill      128 tokens, logits of the last one only
  first token  from the start of the process (mpirun, for mpitp) to the first token, from ids and from text
With --before, the first token alone: of the version whose source tree is TREE and of this one, in turn.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time

PROMPT, ROUNDS, PASSES = 128, 6, 8          # tokens; within a start: rounds of so many tokens, then bare passes
TEXT = "The capital of France is"
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}     # may halve speed


def prompt_of(vocab_size):
    return [(7919 * i + 13) % vocab_size for i in range(PROMPT)]


# --- what runs in the processes: prints JSON ---------------------------------------------------------------------

def mpitp_role(model_path):
    from mpi4py import MPI
    from mpitp.comm import launch
    launch.set_blas_threads(MPI.COMM_WORLD)             # before NumPy
    launch.keep_freed_memory()
    import numpy as np
    import mpitp
    from mpitp import measure

    with mpitp.TensorParallelGroup() as group:
        model = mpitp.load_model(model_path, group)
        ids = np.array([prompt_of(model.config.vocab_size)])
        found = {"prefill": [], "decode": [], "bare": []}
        bare = measure.matrix_vector_products(model)
        for _ in range(ROUNDS):
            found["prefill"] += timed(group.comm, lambda: next(mpitp.generate(model, ids, max_new_tokens=1)), 1)
            steps = mpitp.generate(model, ids, max_new_tokens=PASSES + 1)
            next(steps)
            group.ledger.clear()
            found["decode"] += timed(group.comm, lambda: next(steps), PASSES)
            found["communication"] = group.ledger.seconds() / sum(found["decode"][-PASSES:])
            found["bare"] += timed(group.comm, bare, PASSES)
        found["machine"], found["mpi"] = launch.machine(), launch.library_name()
        if group.rank == 0:
            print(json.dumps(found))


def timed(comm, function, count):
    """Seconds of each call, of the slowest rank."""
    found = []
    for _ in range(count):
        comm.Barrier()
        start = time.perf_counter()
        function()
        found.append(max(comm.allgather(time.perf_counter() - start)))
    return found


def torch_role(model_path, threads):
    import torch
    from transformers import AutoModelForCausalLM
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    ids = torch.tensor([prompt_of(model.config.vocab_size)])
    found = {"prefill": [], "decode": [], "torch": torch.__version__}
    with torch.inference_mode():
        for _ in range(ROUNDS):
            start = time.perf_counter()
            out = model(ids, use_cache=True, logits_to_keep=1)
            token = out.logits[:, -1].argmax(-1)
            found["prefill"].append(time.perf_counter() - start)
            for _ in range(PASSES):
                start = time.perf_counter()
                out = model(token[:, None], past_key_values=out.past_key_values, use_cache=True)
                token = out.logits[:, -1].argmax(-1)
                token.item()
                found["decode"].append(time.perf_counter() - start)
    print(json.dumps(found))


def torch_first_token(model_path, threads, text):
    """What `python -m mpitp generate` does, by transformers."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(model_path) if text else None
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    ids = tokenizer(TEXT, return_tensors="pt").input_ids if text else torch.tensor([first_ids(model_path)])
    with torch.inference_mode():
        token = model(ids, use_cache=True, logits_to_keep=1).logits[:, -1].argmax(-1)
    print(tokenizer.decode(token) if text else token.item(), flush=True)


def first_ids(model_path):
    with open(os.path.join(model_path, "config.json"), encoding="utf-8") as file:
        return prompt_of(json.load(file)["vocab_size"])[:6]


# --- what starts them --------------------------------------------------------------------------------------------

def start(command, key, environment=CLEAN):
    """Run a process: its JSON, or {key: [seconds until it wrote something]}."""
    began = time.perf_counter()
    running = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    first = os.read(running.stdout.fileno(), 1)
    seconds = time.perf_counter() - began
    out, err = running.communicate(timeout=600)
    if running.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{err.decode()}")
    return {key: [seconds]} if key else json.loads(first + out)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", required=True)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--starts", type=int, default=3)
    parser.add_argument("--mpirun", default="mpirun")
    parser.add_argument("--torch-python", metavar="PYTHON", default=sys.executable, help="with torch and transformers")
    parser.add_argument("--without", nargs="*", default=[], choices=("torch", "text"), help="leave these out")
    parser.add_argument("--before", metavar="TREE", help="the source tree of another version, for the first token")
    parser.add_argument("--out", metavar="FOLDER")
    parser.add_argument("--role", choices=("mpitp", "torch", "torch-ids", "torch-text"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role == "mpitp":
        return mpitp_role(arguments.model)
    if arguments.role == "torch":
        return torch_role(arguments.model, arguments.ranks)
    if arguments.role:
        return torch_first_token(arguments.model, arguments.ranks, arguments.role == "torch-text")

    ranks = [arguments.mpirun, "-n", arguments.ranks, sys.executable]
    generate = [*ranks, "-m", "mpitp", "generate", "--model", arguments.model, "--max-new-tokens", 1]
    own = [__file__, "--model", arguments.model, "--ranks", arguments.ranks, "--role"]
    if arguments.before:
        return compare_first_tokens(arguments, generate)
    commands = {("mpitp", None): [*ranks, *own, "mpitp"], ("torch", None): [arguments.torch_python, *own, "torch"]}
    ids = ",".join(map(str, first_ids(arguments.model)))
    for who, of_ids, of_text in (
            ("mpitp", [*generate, "--ids", ids], [*generate, "--prompt", TEXT]),
            ("torch", *([arguments.torch_python, *own, f"torch-{kind}"] for kind in ("ids", "text")))):
        commands[who, "first token from ids"], commands[who, "first token from text"] = of_ids, of_text
    commands = {(who, key): command for (who, key), command in commands.items()
                if who not in arguments.without and not (key and key.split()[-1] in arguments.without)}
    found = {who: [] for who in ("mpitp", "torch")}
    for number in range(arguments.starts):
        of_start = {who: {} for who in found}
        for (who, key), command in commands.items():
            of_start[who].update(start(command, key))
            print(f"start {number + 1} of {arguments.starts}: {who} {key or 'decode and prefill'}", file=sys.stderr)
        for who in found:
            found[who].append(of_start[who])
    write(summary(found, arguments), arguments.out)


def compare_first_tokens(arguments, generate):
    """Print the time to the first token, from ids and from text, of two versions in turn, and their ratio."""
    trees = {"before": os.path.abspath(arguments.before),
             "now": os.path.dirname(os.path.dirname(os.path.abspath(__file__)))}
    prompts = {"ids": ["--ids", ",".join(map(str, first_ids(arguments.model)))], "text": ["--prompt", TEXT]}
    found = {(kind, version): [] for kind in prompts for version in trees}
    for number in range(arguments.starts):
        for kind, prompt in prompts.items():
            for version in sorted(trees, reverse=number % 2 == 1):
                environment = {**CLEAN, "PYTHONPATH": trees[version]}
                found[kind, version] += start([*generate, *prompt], "seconds", environment)["seconds"]
    for kind in prompts:
        for version in trees:
            seconds = found[kind, version]
            print(f"  first token from {kind:<5}{version:<7}{statistics.median(seconds) * 1e3:9.1f} ms   "
                  f"({', '.join(f'{one * 1e3:.0f}' for one in seconds)})")
        ratio = statistics.median(a / b for a, b in zip(found[kind, "before"], found[kind, "now"]))
        print(f"  from {kind}: {ratio:.2f} times as soon as before, the median of the ratios of neighbours")


def summary(found, arguments):
    """{row: medians of each start, and of those}, for both."""
    rows = {}
    for who, starts in found.items():
        for name, values in starts[0].items():
            if isinstance(values, list):
                medians = [statistics.median(of_start[name]) for of_start in starts]
                rows[f"{who} {name}"] = dict(median_seconds=statistics.median(medians), of_starts_seconds=medians)
    rates = [statistics.median(of_start["bare"]) / statistics.median(of_start["decode"]) for of_start in found["mpitp"]]
    first = found["mpitp"][0]
    return {"schema": "mpitp.benchmark.decode/1", "model": os.path.basename(os.path.abspath(arguments.model)),
            "ranks": arguments.ranks, "starts": arguments.starts, "machine": first["machine"], "mpi": first["mpi"],
            "torch": found["torch"][0].get("torch"), "rows": rows, "decode_rate_over_bare": statistics.median(rates),
            "decode_rate_over_bare_of_starts": rates,
            "communication_share": statistics.median(of_start["communication"] for of_start in found["mpitp"]),
            "torch_over_mpitp": {name: rows[f"torch {name}"]["median_seconds"] / rows[f"mpitp {name}"]["median_seconds"]
                                 for name in first if f"torch {name}" in rows}}


def write(found, folder):
    print(f"{found['model']}, float32, {found['ranks']} ranks and threads, {found['starts']} starts of each in turn")
    print(f"{found['machine']}, {found['mpi']}, torch {found['torch']}")
    for name, row in found["rows"].items():
        of_starts = ", ".join(f"{seconds * 1e3:.1f}" for seconds in row["of_starts_seconds"])
        print(f"  {name:<30}{row['median_seconds'] * 1e3:9.1f} ms   ({of_starts})")
    rates = ", ".join(f"{rate:.1%}" for rate in found["decode_rate_over_bare_of_starts"])
    print(f"  decode runs at {found['decode_rate_over_bare']:.1%} of the bare products' rate ({rates}); "
          f"{found['communication_share']:.1%} communication")
    for name, ratio in found["torch_over_mpitp"].items():
        print(f"  {name}: {ratio:.2f} times as fast as transformers on torch")
    if folder:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, f"decode-n{found['ranks']}.json"), "w", encoding="utf-8") as out:
            json.dump(found, out, indent=1)
            out.write("\n")


if __name__ == "__main__":
    sys.exit(main())
