"""One token after the other, of Gemma 3 270M or another checkpoint: against bare products, and transformers on torch.

    pip install '.[mpi,text,numkong]' torch transformers
    python benchmarks/decode.py --model DIR [--starts 3] [--out benchmarks/results] [--torch-python PYTHON]

Starts processes of both kinds in turn, each with the machine for itself, as a machine may be in another memory state
from process to process. DIR is a folder saved from the Hugging Face hub; float32, --ranks ranks against as many
threads.
Rows, each a median over the starts of the median within a start:
  bare          every weight of a rank times a vector, in the same processes as mpitp decodes: the limit of decode
  bare prefill  every weight of a rank times 128 tokens, the head's times one: the limit of prefill
  decode        one token, keys and values kept, greedy
  prefill       128 tokens, logits of the last one only
  first token   from the start of the process (mpirun, for mpitp) to the first token, from ids and from text
Where DIR is in BF16 and NumKong is installed, decode and prefill also with weights that stay in bfloat16, in the same
rounds of the same processes: "bfloat16" with x as it is, "bfloat16 rounded" with x rounded. For each: the bytes of a
rank's weights, the loss over 700 tokens of the README, and whether 32 greedy tokens are those of float32. Without torch
and transformers: --without torch.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from functools import partial

PROMPT, PASSES = 128, 8          # tokens of the prompt; of a round, and bare passes after them
LOSS_TOKENS, TEXT_TOKENS = 700, 32
# What the rows of a kind end in, and load_model's options. float32 is the first: others are compared with it.
KINDS = {"": {}, " bfloat16": dict(weights="bfloat16"),
         " bfloat16 rounded": dict(weights="bfloat16", activations="bfloat16")}
TEXT = "The capital of France is"
CLEAN = {name: value for name, value in os.environ.items() if not name.startswith("OPENBLAS_")}     # may halve speed


def prompt_of(vocab_size):
    return [(7919 * i + 13) % vocab_size for i in range(PROMPT)]


# --- what runs in the processes: prints JSON ---------------------------------------------------------------------

def mpitp_role(model_path, rounds):
    from mpi4py import MPI
    from mpitp.comm import launch
    launch.set_blas_threads(MPI.COMM_WORLD)             # before NumPy
    launch.keep_freed_memory()
    import numpy as np
    import mpitp
    from mpitp import measure

    with mpitp.TensorParallelGroup() as group:
        models = {"": mpitp.load_model(model_path, group)}
        try:
            models.update({kind: mpitp.load_model(model_path, group, **options) for kind, options in KINDS.items()
                           if kind})
        except mpitp.InputError as error:               # no NumKong, or another dtype in the folder
            if group.rank == 0:
                print(f"float32 alone: {error}", file=sys.stderr)
        ids = np.array([prompt_of(models[""].config.vocab_size)])
        found = {f"{row}{kind}": [] for kind in models for row in ("prefill", "decode")}
        found.update({"bare": [], "bare prefill": []})
        bare, bare_prefill = measure.matrix_vector_products(models[""]), measure.prefill_products(models[""], PROMPT)
        for _ in range(rounds):
            for kind, model in models.items():
                found[f"prefill{kind}"] += timed(group.comm, partial(first_token_of, model, ids), 1)
                steps = mpitp.generate(model, ids, max_new_tokens=PASSES + 1)
                next(steps)
                group.ledger.clear()
                found[f"decode{kind}"] += timed(group.comm, partial(next, steps), PASSES)
                if not kind:
                    found["communication"] = group.ledger.seconds() / sum(found["decode"][-PASSES:])
                    found["bare"] += timed(group.comm, bare, PASSES)
                    found["bare prefill"] += timed(group.comm, bare_prefill, 1)
        found["kinds"] = {kind.strip() or "float32": facts_of(model, model_path, group) for kind, model in
                          models.items()}
        found["machine"], found["mpi"] = launch.machine(), launch.library_name()
        if len(models) > 1:
            from mpitp.ops import packed
            found["numkong"] = packed.description()
        if group.rank == 0:
            print(json.dumps(found))


def first_token_of(model, ids):
    import mpitp
    return next(mpitp.generate(model, ids, max_new_tokens=1))


def facts_of(model, model_path, group):
    """What a kind of weights takes and gives: bytes of a rank's weights, loss, greedy tokens."""
    import mpitp
    from mpitp.commands.score import score
    ids = text_ids(model_path, model.config.vocab_size)
    loss = score(model, ids, LOSS_TOKENS - 1, LOSS_TOKENS - 1)[0]
    tokens = [int(step[0]) for step in mpitp.generate(model, ids[None, :6], max_new_tokens=TEXT_TOKENS)]
    return dict(weight_bytes_of_ranks=group.comm.allgather(model.local_bytes()), loss=loss, tokens=tokens)


def text_ids(model_path, vocab_size):
    """The first tokens of the README, and without a tokenizer as many other ones."""
    import numpy as np
    try:
        from mpitp.commands import text
        with open(os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "README.md"),
                  encoding="utf-8") as file:
            ids = text.encode(text.load_tokenizer(model_path), file.read())
    except Exception as error:                          # no tokenizers, no tokenizer.json
        print(f"numbers for tokens: {error}", file=sys.stderr)
        ids = [(7919 * i + 13) % vocab_size for i in range(LOSS_TOKENS)]
    return np.array(ids[:LOSS_TOKENS])


def timed(comm, function, count):
    """Seconds of each call, of the slowest rank."""
    found = []
    for _ in range(count):
        comm.Barrier()
        start = time.perf_counter()
        function()
        found.append(max(comm.allgather(time.perf_counter() - start)))
    return found


def torch_role(model_path, threads, rounds):
    import torch
    from transformers import AutoModelForCausalLM
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
    ids = torch.tensor([prompt_of(model.config.vocab_size)])
    found = {"prefill": [], "decode": [], "torch": torch.__version__}
    with torch.inference_mode():
        for _ in range(rounds):
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

def start(command, key):
    """Run a process: its JSON, or {key: [seconds until it wrote something]}."""
    began = time.perf_counter()
    running = subprocess.Popen(list(map(str, command)), env=CLEAN, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
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
    parser.add_argument("--rounds", type=int, default=6, help="within a start (6)")
    parser.add_argument("--mpirun", default="mpirun")
    parser.add_argument("--torch-python", metavar="PYTHON", default=sys.executable, help="with torch and transformers")
    parser.add_argument("--without", nargs="*", default=[], choices=("torch", "text"), help="leave these out")
    parser.add_argument("--out", metavar="FOLDER")
    parser.add_argument("--role", choices=("mpitp", "torch", "torch-ids", "torch-text"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role == "mpitp":
        return mpitp_role(arguments.model, arguments.rounds)
    if arguments.role == "torch":
        return torch_role(arguments.model, arguments.ranks, arguments.rounds)
    if arguments.role:
        return torch_first_token(arguments.model, arguments.ranks, arguments.role == "torch-text")

    ranks = [arguments.mpirun, "-n", arguments.ranks, sys.executable]
    generate = [*ranks, "-m", "mpitp", "generate", "--model", arguments.model, "--max-new-tokens", 1]
    own = [__file__, "--model", arguments.model, "--ranks", arguments.ranks, "--rounds", arguments.rounds, "--role"]
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
            found[who] += [of_start[who]] if of_start[who] else []
    write(summary(found, arguments), arguments.out)


def summary(found, arguments):
    """{row: medians of each start, and of those}, for both."""
    rows = {}
    for who, starts in found.items():
        for name, values in (starts[0] if starts else {}).items():
            if isinstance(values, list):
                medians = [statistics.median(of_start[name]) for of_start in starts]
                rows[f"{who} {name}"] = dict(median_seconds=statistics.median(medians), of_starts_seconds=medians)
    mine, first = found["mpitp"], found["mpitp"][0]
    rates = of_starts(mine, "bare", "decode")
    over_bare = of_starts(mine, "prefill", "bare prefill")
    return {"schema": "mpitp.benchmark.decode/1", "model": os.path.basename(os.path.abspath(arguments.model)),
            "ranks": arguments.ranks, "starts": arguments.starts, "machine": first["machine"], "mpi": first["mpi"],
            "numkong": first.get("numkong"), "torch": found["torch"][0].get("torch") if found["torch"] else None,
            "rows": rows, "decode_rate_over_bare": statistics.median(rates), "decode_rate_over_bare_of_starts": rates,
            "prefill_over_bare": statistics.median(over_bare), "prefill_over_bare_of_starts": over_bare,
            "communication_share": statistics.median(of_start["communication"] for of_start in mine),
            "torch_over_mpitp": {name: rows[f"torch {name}"]["median_seconds"] / rows[f"mpitp {name}"]["median_seconds"]
                                 for name in first if f"torch {name}" in rows},
            "kinds": {kind: of_kind(kind, facts, first["kinds"]["float32"], mine)
                      for kind, facts in first["kinds"].items()}}


def of_starts(starts, name, other):
    """One row's median over another's, of each start."""
    return [statistics.median(of_start[name]) / statistics.median(of_start[other]) for of_start in starts]


def of_kind(kind, facts, float32, starts):
    """What a kind of weights gives beside float32: times and memory over its own, the loss, how many tokens agree."""
    end = "" if kind == "float32" else f" {kind}"
    decode, prefill = (of_starts(starts, row, row + end) for row in ("decode", "prefill"))
    same = [a == b for a, b in zip(facts["tokens"], float32["tokens"])]
    return dict(float32_over_this_decode=statistics.median(decode), float32_over_this_decode_of_starts=decode,
                float32_over_this_prefill=statistics.median(prefill),
                weight_bytes_of_ranks=facts["weight_bytes_of_ranks"],
                weight_bytes_over_float32=max(facts["weight_bytes_of_ranks"]) / max(float32["weight_bytes_of_ranks"]),
                loss=facts["loss"], loss_relative_difference=abs(facts["loss"] / float32["loss"] - 1),
                loss_tokens=LOSS_TOKENS, equal_tokens=[*same, False].index(False), text_tokens=TEXT_TOKENS)


def write(found, folder):
    print(f"{found['model']}, float32, {found['ranks']} ranks and threads, {found['starts']} starts of each in turn")
    print(f"{found['machine']}, {found['mpi']}, torch {found['torch']}, {found['numkong']}")
    for name, row in found["rows"].items():
        of_starts = ", ".join(f"{seconds * 1e3:.1f}" for seconds in row["of_starts_seconds"])
        print(f"  {name:<30}{row['median_seconds'] * 1e3:9.1f} ms   ({of_starts})")
    rates = ", ".join(f"{rate:.1%}" for rate in found["decode_rate_over_bare_of_starts"])
    print(f"  decode runs at {found['decode_rate_over_bare']:.1%} of the bare products' rate ({rates}); "
          f"{found['communication_share']:.1%} communication")
    print(f"  prefill takes {found['prefill_over_bare']:.2f} times its bare products")
    for name, ratio in found["torch_over_mpitp"].items():
        print(f"  {name}: {ratio:.2f} times as fast as transformers on torch")
    for kind, row in found["kinds"].items():
        print(f"  weights {kind}: decode {row['float32_over_this_decode']:.2f} and prefill "
              f"{row['float32_over_this_prefill']:.2f} times as fast as float32, "
              f"{row['weight_bytes_over_float32']:.3f} of its memory, "
              f"loss {row['loss']:.7f} ({row['loss_relative_difference']:.1e} beside it), "
              f"{row['equal_tokens']} of {row['text_tokens']} tokens equal")
    if folder:
        os.makedirs(folder, exist_ok=True)
        with open(os.path.join(folder, f"decode-n{found['ranks']}.json"), "w", encoding="utf-8") as out:
            json.dump(found, out, indent=1)
            out.write("\n")


if __name__ == "__main__":
    sys.exit(main())
